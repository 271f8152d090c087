"""LensNet decides where detail is worth its place in the working context."""

from mc_ds.model.lensnet.index import IndexNet, sum_children
from mc_ds.model.lensnet.lensnet import LensBlock, LensNet

__all__ = ["IndexNet", "LensBlock", "LensNet", "sum_children"]
