"""LensNet: scores where more detail in the working context is worth its cost."""

from mc_ds.model.lensnet.index import IndexNet, sum_children
from mc_ds.model.lensnet.lensnet import LensNet

__all__ = ["IndexNet", "LensNet", "sum_children"]
