"""Tables of measured losses.

Legend: N windows, S slices, P policies, Z sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def clustered(differences_NS: NDArray[np.floating]) -> tuple[float, float]:
    """Return the mean over all slices and its standard error, clustered by window."""
    means = differences_NS.mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)


def table_lines(arrays: Arrays, rows: NDArray[np.bool_]) -> Iterator[str]:
    """Yield a line per policy with its losses minus the recency window's, for each size, over the
    windows selected by `rows`.
    """
    recency = arrays["recency"][rows]
    yield f"{rows.sum()} windows, recency {recency.mean():.4f}; {list(arrays['sizes'])} blocks"
    if "full" in arrays:
        yield line("full", [arrays["full"][rows] - recency])
    for number, name in enumerate(arrays["policies"]):
        losses = arrays["losses"][rows, :, number]
        cells = [losses[..., size] - recency for size in range(losses.shape[-1])]
        yield line(str(name), cells)
    if "greedy" in arrays:
        losses = arrays["greedy"][rows]
        yield line(
            "greedy, 1 to 6", [losses[..., n] - losses[..., 0] for n in range(1, losses.shape[-1])]
        )


def line(name: str, cells: Sequence[NDArray[np.floating]]) -> str:
    """Return one line of a table."""
    figures = (clustered(cell) for cell in cells)
    return f"{name:24s} " + "  ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in figures)
