"""Measures the losses of contexts whose blocks were chosen by policies.

Legend: N windows, S slices, M distant blocks, P policies, Z sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gains.reader import Reader

GREEDY_CANDIDATES = 22
"""Number of blocks, those with the largest single gains, among which the greedy oracle chooses."""


def policy_losses(
    reader: Reader, ids: Tensor, scores_PSM: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the losses [S, P, Z] with each policy's z best distant blocks in place of the z oldest
    recent ones, and the losses [S] of the recency window.

    Raises ValueError for a size above the number of recent blocks.
    """
    layout = reader.layout
    if max(sizes) > layout.recent:
        raise ValueError(
            f"{max(sizes)} blocks cannot replace the {layout.recent} recent ones: use smaller sizes"
        )
    best = scores_PSM.argsort(dim=-1, descending=True, stable=True)
    recency = layout.recency.to(reader.device).expand(layout.slices, -1)
    chosen = [layout.replacing(best[..., :size].flatten(0, 1)) for size in sizes]
    entries = layout.horizons().to(reader.device).repeat(1 + len(sizes) * len(scores_PSM), 1)
    losses = reader.losses(ids, torch.cat([recency, *chosen]), entries).mean(-1)
    by_size = losses[layout.slices :].view(len(sizes), len(scores_PSM), layout.slices)
    return by_size.permute(2, 1, 0), losses[: layout.slices]


def greedy_losses(
    reader: Reader, ids: Tensor, gains_SM: Tensor, slices: Sequence[int], rounds: int
) -> Tensor:
    """Return the losses [slices, rounds + 1] of an oracle that in each round adds the distant block
    that lowers the loss most.

    It replaces the oldest remaining recent block. All candidates, GREEDY_CANDIDATES blocks, are
    measured in each round. If none lowers the loss, nothing is replaced.
    """
    layout, device = reader.layout, reader.device
    rivals = [gains_SM[s].argsort(descending=True)[:GREEDY_CANDIDATES].tolist() for s in slices]
    horizons = layout.horizons().to(device)[list(slices)]
    best = reader.losses(ids, layout.recency.to(device).expand(len(slices), -1), horizons).mean(-1)
    chosen: list[list[int]] = [[] for _ in slices]
    losses = [best]
    for _ in range(rounds):
        tried = [
            (i, [*chosen[i], block])
            for i in range(len(slices))
            for block in rivals[i]
            if block not in chosen[i]
        ]
        found = _measured(
            reader, ids, [blocks for _, blocks in tried], horizons, [i for i, _ in tried]
        )
        best = best.clone()
        for (i, blocks), loss in zip(tried, found.tolist(), strict=True):
            if loss < float(best[i]):
                best[i], chosen[i] = loss, blocks
        losses.append(best)
    return torch.stack(losses, dim=1)


def _measured(
    reader: Reader, ids: Tensor, sets: list[list[int]], horizons: Tensor, owners: list[int]
) -> Tensor:
    """Return the loss of each set of distant blocks; sets may have different sizes."""
    found = horizons.new_empty(len(sets), dtype=torch.float32)
    for size in sorted({len(blocks) for blocks in sets}):
        rows = [i for i, blocks in enumerate(sets) if len(blocks) == size]
        contexts = reader.layout.replacing(
            torch.tensor([sets[i] for i in rows], device=reader.device)
        )
        entries = horizons[[owners[i] for i in rows]]
        found[rows] = reader.losses(ids, contexts, entries).mean(-1)
    return found
