"""The Llama-family decoder that reads working contexts."""

from mc_ds.model.backbone.decoder import Backbone, DecoderBlock
from mc_ds.model.backbone.loss import HeadOutput, LossHead

__all__ = ["Backbone", "DecoderBlock", "HeadOutput", "LossHead"]
