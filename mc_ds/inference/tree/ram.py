"""A tree in memory: gists and index vectors on the device of the networks, tokens on the host."""

import torch

from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.rows import RamRows, Rows
from mc_ds.inference.tree.tree import MegaContextTree


class RamTree(MegaContextTree):
    """A MegaContextTree in memory; lost when the process ends."""

    def __init__(self, nets: TreeNets, *, batch_tokens: int | None = None) -> None:
        shape, levels = nets.shape, range(nets.shape.max_lod)
        tokens = RamRows(1, torch.int32, torch.device("cpu"))
        gists: list[Rows] = [RamRows(shape.dim, shape.dtype, nets.device) for _ in levels]
        index: list[Rows] = [RamRows(shape.index_width, torch.float32, nets.device) for _ in levels]
        super().__init__(nets, tokens, gists, index, batch_tokens=batch_tokens)

    def commit(self) -> None:
        """Do nothing: a tree in memory cannot be durable."""

    def _after_batch(self) -> None:
        """Do nothing."""
