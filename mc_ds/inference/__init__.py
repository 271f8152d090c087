"""Inference: sessions over histories of any length.

Data flows `tree` (what is known, at every level of detail) -> `window` and `contexts` (what is read of it) -> `decoder` (what follows).
`nets`, `rows`, `ram_tree` and `disk_tree` belong to the tree, `search` and `phases` to contexts, `sampling`, `text` and `generation` to
what is said; `session` and `model` put them together, `store` keeps them. Nothing here knows training.
"""

from mc_ds.inference.decoding.sampling import Sampling
from mc_ds.inference.model import POLICIES, InferenceModel, load_bundle
from mc_ds.inference.session import Losses, Piece, Session
from mc_ds.inference.tree.disk import DiskTree, open_tree
from mc_ds.inference.tree.nets import TreeNets, TreeShape
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.tree import MegaContextTree

__all__ = [
    "POLICIES",
    "DiskTree",
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
