"""Inference: sessions over histories of any length.

Data flows from `tree` (the history at every level of detail) to `reading` (the working context
chosen from it) to `decoding` (the tokens that follow). A `Reader` keeps these three consistent for
one history; `session` is its public interface, `store` saves sessions, `model` creates them.
Nothing here imports `training`.
"""

from mc_ds.inference.decoding.ending import Ending
from mc_ds.inference.decoding.generation import Piece
from mc_ds.inference.decoding.sampling import Sampling
from mc_ds.inference.model import InferenceModel, load_bundle
from mc_ds.inference.reader import Losses
from mc_ds.inference.session import Session
from mc_ds.inference.settings import SESSION_POLICIES
from mc_ds.inference.tree.disk import DiskTree, open_tree
from mc_ds.inference.tree.nets import TreeNets, TreeShape
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.tree import MegaContextTree

__all__ = [
    "SESSION_POLICIES",
    "DiskTree",
    "Ending",
    "InferenceModel",
    "Losses",
    "MegaContextTree",
    "Piece",
    "RamTree",
    "Sampling",
    "Session",
    "TreeNets",
    "TreeShape",
    "load_bundle",
    "open_tree",
]
