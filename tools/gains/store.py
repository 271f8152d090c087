"""Stores recordings in small files: projected states, selected attention heads, floats as bytes.

Projections and heads are fitted to the training windows only.

Legend: N windows of a file, S slices, C candidates, P pooled queries, L layers of keys (queries
have the final layer too), E projected width, A heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gains.record import Window

LEAST_MASS = 1e-6
"""Smallest attention that can be stored; less is stored as this."""
STATE_SCALE = 32
"""Stored integer value of one standard deviation of a projected state."""
CLIPPED_GAIN = 0.1
"""Clipping of gains, in nats, for choosing heads, so that a few slices do not dominate."""
PART_BYTES = 15 * 2**20
"""Approximate maximum size of a file."""


@dataclass(frozen=True)
class Raw:
    """A recorded window before compression, on the CPU."""

    window: int
    candidates: Tensor
    content: Window


@dataclass(frozen=True)
class Codec:
    """Projections and heads, fitted to the training windows."""

    query_bases: list[Tensor]
    """For each layer, the whitening projection [D + 1, E] (see `whitening`)."""
    key_bases: list[Tensor]
    local_heads: Tensor
    full_heads: Tensor


def fit(training: Sequence[Raw], *, width: int, heads: int) -> Codec:
    """Fit whitening projections to `width` dimensions, and select the `heads` heads whose attention
    correlates most with the gains.
    """
    contents = [raw.content for raw in training]
    queries = torch.cat([content.queries.flatten(0, 1) for content in contents]).float()
    keys = torch.cat([content.keys for content in contents]).float()
    return Codec(
        [whitening(queries[:, layer], width) for layer in range(queries.size(1))],
        [whitening(keys[:, layer], width) for layer in range(keys.size(1))],
        best_heads(contents, "local_mass", heads),
        best_heads(contents, "full_mass", heads),
    )


def whitening(states_XD: Tensor, width: int) -> Tensor:
    """Return the affine map [D + 1, E] from states [X, D] to their first principal components with
    unit variance. The last row is the offset.
    """
    mean = states_XD.mean(0)
    scale = states_XD.std(0) + 1e-6
    standard = (states_XD - mean) / scale
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    basis = vectors[:, -width:].flip(1) / values[-width:].flip(0).clamp(min=1e-9).sqrt()
    projection = basis / scale[:, None]
    return torch.cat([projection, -(mean @ projection)[None]])


def project(states: Tensor, base: Tensor) -> Tensor:
    """Apply a whitening map to states [..., D], and return them as int8 [..., E]."""
    projected = states.float() @ base[:-1] + base[-1]
    return (projected * STATE_SCALE).round().clamp(-127, 127).to(torch.int8)


def best_heads(contents: Sequence[Window], name: str, count: int) -> Tensor:
    """Return the indices of the `count` heads whose log attention correlates most with the clipped
    gains, both centred within slices.
    """
    products = squares = gain_squares = torch.tensor(0.0)
    for content in contents:
        mass = getattr(content, name).float().clamp(min=LEAST_MASS).log()
        mass = mass - mass.mean(-1, keepdim=True)
        gains = content.gains.float().clamp(-CLIPPED_GAIN, CLIPPED_GAIN)
        gains = gains - gains.mean(-1, keepdim=True)
        products = products + torch.einsum("shc,sc->h", mass, gains)
        squares = squares + mass.square().sum((0, 2))
        gain_squares = gain_squares + gains.square().sum()
    correlation = products / (squares * gain_squares).sqrt().clamp(min=1e-12)
    return correlation.argsort(descending=True)[:count]


def mass_bytes(mass: Tensor) -> Tensor:
    """Return attention in (0, 1] as bytes on a logarithmic scale."""
    logs = mass.float().clamp(min=LEAST_MASS).log() / -np.log(LEAST_MASS)
    return ((logs + 1) * 255).round().clamp(0, 255).to(torch.uint8)


def log_mass(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the logarithms of attention encoded by `mass_bytes`."""
    return ((codes.astype(np.float32) / 255 - 1) * -np.log(LEAST_MASS)).astype(np.float32)


def encode(raw: Raw, codec: Codec) -> dict[str, Tensor]:
    """Return the compressed arrays of one window."""
    content = raw.content
    queries = content.queries
    return {
        "window": torch.tensor(raw.window, dtype=torch.int32),
        "candidates": raw.candidates.to(torch.int16),
        "recency": content.recency.float(),
        "full": content.full.float(),
        "gains": content.gains.half(),
        "queries": torch.stack(
            [project(queries[:, :, i], b) for i, b in enumerate(codec.query_bases)], 2
        ),
        "keys": torch.stack(
            [project(content.keys[:, i], b) for i, b in enumerate(codec.key_bases)], 1
        ),
        "salience": content.salience.half(),
        "late": (content.late.float() * 127).round().to(torch.int8),
        "expected": content.expected.half(),
        "local_mass": mass_bytes(content.local_mass[:, codec.local_heads]),
        "full_mass": mass_bytes(content.full_mass[:, codec.full_heads]),
        "local_mean": content.local_mass.float().mean(1),
        "full_mean": content.full_mass.float().mean(1),
    }


def write_parts(folder: Path, encoded: Sequence[Mapping[str, Tensor]]) -> list[Path]:
    """Write windows to files of about PART_BYTES, each with windows of equal numbers of candidates;
    return their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.glob("gains-*.npz")):
        raise ValueError(f"{folder} already contains a recording: give another folder")
    paths = []
    by_count: dict[int, list[Mapping[str, Tensor]]] = {}
    for window in encoded:
        by_count.setdefault(len(window["candidates"]), []).append(window)
    for count, windows in by_count.items():
        size = sum(x.numel() * x.element_size() for x in windows[0].values())
        step = max(1, PART_BYTES // size)
        for first in range(0, len(windows), step):
            part = windows[first : first + step]
            paths.append(folder / f"gains-{count}-{first:04d}.npz")
            save(paths[-1], {k: torch.stack([w[k] for w in part]).numpy() for k in part[0]})
    return paths


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays to an .npz file."""
    np.savez(path, **arrays)


def read_parts(folder: Path) -> list[dict[str, NDArray[Any]]]:
    """Return all windows in a folder, in order of their numbers. Raises FileNotFoundError if there
    are none.
    """
    windows = []
    for path in sorted(folder.glob("gains-*.npz")):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        windows += [{k: v[i] for k, v in arrays.items()} for i in range(len(arrays["window"]))]
    if not windows:
        raise FileNotFoundError(f"{folder} contains no gains-*.npz: run `record` first")
    return sorted(windows, key=lambda window: int(window["window"]))
