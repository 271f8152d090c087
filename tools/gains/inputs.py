"""Converts recorded windows to inputs of rankers.

Legend: N windows, S slices, M distant blocks, C candidates, F features, D width of the
backbone, E width of vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gains.layout import Layout
from gains.lexical import lexical_features
from gains.record import POOLED
from gains.store import STATE_SCALE, log_mass, project, whitening
from gains.windows import Windows

Recorded = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Inputs:
    """The inputs of rankers for windows with equal numbers of candidates, by name."""

    features: dict[str, Tensor]
    """[N, S, C, F]: distance, words, expected, late, salience, own_heads, full_heads."""
    queries: dict[str, Tensor]
    """[N, S, E]: `free` (context-free) and `context`."""
    keys: dict[str, Tensor]
    """[N, C, E]: `free` (context-free) and `context`."""
    gains: Tensor
    """[N, S, C] single-block gains, the targets."""

    def __len__(self) -> int:
        return len(self.gains)

    def part(self, rows: Tensor | slice) -> "Inputs":
        """Return the inputs of the windows `rows`."""
        return Inputs(
            {name: x[rows] for name, x in self.features.items()},
            {name: x[rows] for name, x in self.queries.items()},
            {name: x[rows] for name, x in self.keys.items()},
            self.gains[rows],
        )


def read_inputs(
    recorded: Sequence[Recorded], windows: Windows, layout: Layout, vectors: "FreeVectors"
) -> Inputs:
    """Return the inputs of recorded windows, which must have equal numbers of candidates."""
    rows = [window_inputs(window, windows, layout) for window in recorded]
    features = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    free = [
        vectors.of(windows.ids[int(r["window"])], np.asarray(r["candidates"]), layout)
        for r in recorded
    ]

    def states(name: str) -> Tensor:
        arrays = torch.from_numpy(np.stack([np.asarray(r[name], np.float32) for r in recorded]))
        return arrays / STATE_SCALE

    return Inputs(
        features,
        {"free": torch.stack([q for q, _ in free]), "context": states("queries").flatten(2)},
        {"free": torch.stack([k for _, k in free]), "context": states("keys").flatten(2)},
        torch.from_numpy(np.stack([np.asarray(r["gains"], np.float32) for r in recorded])),
    )


def window_inputs(
    recorded: Recorded, windows: Windows, layout: Layout
) -> dict[str, NDArray[np.float32]]:
    """Return the features [S, C, F] of one window, by name."""
    candidates = np.asarray(recorded["candidates"], np.int64)
    gains = np.asarray(recorded["gains"])
    words = lexical_features(windows.ids[int(recorded["window"])], layout)[:, candidates]
    back = (layout.distant - candidates).astype(np.float32)
    distance = np.stack([np.log(back), back / layout.distant], axis=-1)
    salience = np.asarray(recorded["salience"], np.float32)[:, None]

    def last(x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Reshape [S, ..., C] to [S, C, F]: flatten heads or layers, and move them to the end."""
        return np.moveaxis(np.asarray(x, np.float32).reshape(len(x), -1, len(candidates)), 1, 2)

    def heads(which: str) -> NDArray[np.float32]:
        mean = np.log(np.asarray(recorded[f"{which}_mean"], np.float32) + 1e-6)[..., None]
        return np.concatenate([last(log_mass(recorded[f"{which}_mass"])), mean], axis=-1)

    return {
        "distance": np.broadcast_to(distance, (*gains.shape, 2)).copy(),
        "words": np.log1p(words),
        "expected": np.log1p(np.asarray(recorded["expected"], np.float32))[..., None],
        "late": last(recorded["late"]) / 127,
        "salience": np.broadcast_to(salience, (*gains.shape, 1)).copy(),
        "own_heads": heads("local"),
        "full_heads": heads("full"),
    }


class FreeVectors:
    """Context-free vectors of blocks and queries: projected sums of token embeddings, weighted by
    rarity for blocks.
    """

    def __init__(
        self,
        embedding_VD: Tensor,
        windows: Windows,
        numbers: Sequence[int],
        layout: Layout,
        *,
        width: int,
    ) -> None:
        self._embedding = F.normalize(embedding_VD.float(), dim=-1)
        pairs = [self._raw(windows.ids[n], layout) for n in numbers]
        self._query_base = whitening(torch.cat([q.flatten(0, 1) for q, _ in pairs]), width)
        self._key_base = whitening(torch.cat([k for _, k in pairs]), width)

    def of(
        self, ids: NDArray[np.uint16], candidates: NDArray[np.generic], layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Return queries [S, E] and keys [C, E] of one window."""
        queries, keys = self._raw(ids, layout)
        chosen = torch.from_numpy(candidates.astype(np.int64))
        projected = (
            project(queries, self._query_base).flatten(1),
            project(keys[chosen], self._key_base),
        )
        return projected[0].float() / STATE_SCALE, projected[1].float() / STATE_SCALE

    def _raw(self, ids: NDArray[np.uint16], layout: Layout) -> tuple[Tensor, Tensor]:
        """Return query means [S, POOLED, D] and key sums [M, D]."""
        tokens = torch.from_numpy(ids.astype(np.int64))
        size = layout.distant * layout.block_size
        counts = torch.bincount(tokens[:size], minlength=len(self._embedding))
        blocks = tokens[:size].view(layout.distant, -1)
        keys = torch.einsum("mkd,mk->md", self._embedding[blocks], 1 / (1 + counts[blocks].float()))
        last = self._embedding[tokens[layout.known_entries(max(POOLED))]]
        return torch.stack([last[:, -n:].mean(1) for n in POOLED], 1), F.normalize(keys, dim=-1)
