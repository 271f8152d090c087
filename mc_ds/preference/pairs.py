"""Select the pairs of rows that train LensNet, and weigh their moves.

All counts are fixed by the configuration and all selections are masks, so nothing here synchronises
with the host.

Legend: B sequences, G rows of a sequence (a and b index them). Source:
docs/lensnet-pairwise-training.md, "Preference learning".
"""

import torch
from torch import Tensor


def gains(row_scores: Tensor) -> Tensor:
    """Return g(a -> b) = score(a) - score(b), [B, a, b], positive where b is better. `row_scores`
    are [B, G].
    """
    return row_scores[:, :, None] - row_scores[:, None, :]


def pairs_kept(rows: int, max_pairs: int, hard_negative_ratio: float) -> int:
    """Return how many unordered pairs of `rows` rows are kept per sequence: the share
    `hard_negative_ratio` of at most `max_pairs`, but at least one.
    """
    return max(1, round(hard_negative_ratio * min(max_pairs, rows * (rows - 1) // 2)))


def select_pairs(gain: Tensor, possible: Tensor, best: Tensor, kept: int) -> Tensor:
    """Return a mask [B, a, b] of the moves of `kept` unordered pairs: first the pairs of the best
    row, then those with the largest |g|.

    `gain` and `possible` (the moves that may be chosen) are [B, a, b]; `best` [B] is the index of
    the best variant. A chosen pair keeps both directions where they are possible.
    """
    batch, rows, _ = gain.shape
    is_best = torch.arange(rows, device=gain.device) == best[:, None]
    with_best = is_best[:, :, None] | is_best[:, None, :]
    size = gain.abs().double()
    above_all = size.amax((1, 2), keepdim=True) + 1
    # Each pair once, in the upper triangle; pairs of the best row rank above all others.
    once = (possible | possible.transpose(1, 2)).triu(1)
    priority = torch.where(once, size + with_best * above_all, -1.0).flatten(1)
    # A stable sort makes the same choice on every device.
    first = priority.argsort(dim=1, descending=True, stable=True)[:, :kept]
    chosen = (
        torch.zeros_like(priority, dtype=torch.bool).scatter(1, first, True).view(batch, rows, rows)
        & once
    )
    return (chosen | chosen.transpose(1, 2)) & possible


def move_weights(gain: Tensor, std: Tensor) -> Tensor:
    """Return v = tanh(|g| / std), float64 of the shape of `gain`. If no gains have been seen (std =
    0): 1 where g is not 0, else 0.
    """
    size = gain.abs().double()
    unknown = std == 0
    return torch.where(
        unknown, (size > 0).double(), torch.tanh(size / torch.where(unknown, 1.0, std))
    )
