"""Activation checkpointing: some blocks of a stack keep only their input in the forward pass, and
are recomputed in the backward pass.

Legend: R rows, W entries, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed_blocks(count: int, share: float) -> list[bool]:
    """Return, for each of `count` blocks in forward order, whether the backward pass recomputes it.

    `share`, in [0, 1], of them are, rounded to the nearest number and spread evenly. The last block
    is recomputed only if all are: the backward pass needs its values first, while those of all
    other blocks are still kept, so recomputing it saves no memory.
    """
    kept = count - round(share * count)
    return [kept * (i + 1) // count == kept * i // count for i in range(count)]


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, tables: Sequence[Tensor], *, recomputed: float
) -> Tensor:
    """Run `x`, [R, W, D], through all blocks with the rotary `tables`. The backward pass, if there
    will be one, recomputes the share `recomputed` of the blocks (non-reentrant).
    """
    share = recomputed if torch.is_grad_enabled() else 0.0
    for block, again in zip(blocks, recomputed_blocks(len(blocks), share), strict=True):
        if again:
            x = checkpoint(block, x, *tables, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *tables)
    return x
