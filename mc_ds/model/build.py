"""Build the model and LensNet of a config. Only this module decides which of them a run has."""

import torch

from mc_ds.config import RunConfig
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel


def build_model(config: RunConfig, *, vocab_size: int) -> MegaContextModel:
    """Return backbone and GistNet with random weights, on torch's default device."""
    return MegaContextModel(config, vocab_size=vocab_size)


def build_lensnet(config: RunConfig) -> LensNet | None:
    """Return LensNet with random weights, on torch's default device; None for a plain language
    model.
    """
    return LensNet(config.mc, dim=config.backbone.dim) if config.mc.num_random_variants else None


def build_networks(
    config: RunConfig, *, vocab_size: int, device: str | torch.device = "cpu"
) -> tuple[MegaContextModel, LensNet | None]:
    """Return model and LensNet with random weights on `device`; on "meta" they take no memory."""
    with torch.device(device):
        return build_model(config, vocab_size=vocab_size), build_lensnet(config)
