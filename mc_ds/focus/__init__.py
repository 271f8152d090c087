"""Focus: builds a working context of exact length from LensNet's scores. Inference only."""

from mc_ds.focus.allocator import FocusAllocator, Scorer
from mc_ds.focus.cover import (
    block_lods,
    block_scores,
    coarsest_blocks,
    covering_entries,
    even_blocks,
    open_nodes,
    plan_of_blocks,
    uniform_blocks,
    units_used,
)

__all__ = [
    "FocusAllocator",
    "Scorer",
    "block_lods",
    "block_scores",
    "coarsest_blocks",
    "covering_entries",
    "even_blocks",
    "open_nodes",
    "plan_of_blocks",
    "uniform_blocks",
    "units_used",
]
