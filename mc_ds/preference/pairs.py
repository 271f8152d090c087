"""Which pairs of rows teach LensNet, and how much each of their moves weighs.

Every count is fixed by the configuration and every choice is a mask, so nothing here waits for
the device.

Legend: B sequences, G rows of a sequence (a and b index them). Source:
docs/lensnet-pairwise-training.md, "Preference learning".
"""

import torch
from torch import Tensor


def gains(row_scores: Tensor) -> Tensor:
    """Return g(a -> b) = score(a) - score(b), [B, a, b]: above 0 where b is better. `row_scores`
    [B, G].
    """
    return row_scores[:, :, None] - row_scores[:, None, :]


def pairs_kept(rows: int, max_pairs: int, hard_negative_ratio: float) -> int:
    """Return how many unordered pairs of `rows` rows a sequence keeps: at most `max_pairs`, of
    those the given share, at least one.
    """
    return max(1, round(hard_negative_ratio * min(max_pairs, rows * (rows - 1) // 2)))


def select_pairs(gain: Tensor, possible: Tensor, best: Tensor, kept: int) -> Tensor:
    """Select the moves of `kept` unordered pairs, as a mask [B, a, b]: first the pairs of the best
    row, then those with the largest |g|.

    `gain` [B, a, b]; `possible` [B, a, b], the moves that may be chosen; `best` [B], the index of
    the best variant. A chosen pair keeps both of its directions where they are possible.
    """
    batch, rows, _ = gain.shape
    is_best = torch.arange(rows, device=gain.device) == best[:, None]
    with_best = is_best[:, :, None] | is_best[:, None, :]
    size = gain.abs().double()
    above_all = size.amax((1, 2), keepdim=True) + 1
    once = (possible | possible.transpose(1, 2)).triu(1)
    priority = torch.where(once, size + with_best * above_all, -1.0).flatten(1)
    first = priority.argsort(dim=1, descending=True, stable=True)[
        :, :kept
    ]  # stable: the same choice wherever it is made
    chosen = (
        torch.zeros_like(priority, dtype=torch.bool).scatter(1, first, True).view(batch, rows, rows)
        & once
    )
    return (chosen | chosen.transpose(1, 2)) & possible


def move_weights(gain: Tensor, std: Tensor) -> Tensor:
    """Return v = tanh(|g| / std), float64 of the shape of `gain`. While no gains have been seen
    (std = 0): 1 where g is not 0, else 0.
    """
    size = gain.abs().double()
    unknown = std == 0
    return torch.where(
        unknown, (size > 0).double(), torch.tanh(size / torch.where(unknown, 1.0, std))
    )
