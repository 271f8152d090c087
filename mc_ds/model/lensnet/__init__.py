"""LensNet decides where detail is worth its place in the working context."""

from mc_ds.model.lensnet.index import IndexNet, sum_children
from mc_ds.model.lensnet.lensnet import LensNet

__all__ = ["IndexNet", "LensNet", "sum_children"]
