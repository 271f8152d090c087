"""Smoothing, chance and certainty: the few statistics that a report needs.

Legend: n values, w values in a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMOOTHED_FROM = 20
"""Values below which a curve is drawn as it is."""
WINDOWS = 10
"""Windows that a smoothed curve has."""
EXACT_UP_TO = 12
"""Pairs whose signs are flipped in every way; of more, `DRAWS` ways are drawn."""
DRAWS = 20_000
SURE, LIKELY = 0.01, 0.05
"""Chances of a difference by luck below which it is called sure, and likely."""


def window_of(count: int) -> int:
    """Return how many values a smoothed curve of `count` values averages, an odd number; 1 where
    it is not smoothed.
    """
    return 1 if count < SMOOTHED_FROM else count // WINDOWS // 2 * 2 + 1


def smoothed(values: Sequence[float], window: int) -> Floats:
    """Return the mean of the `window` values around each [n], of fewer at both ends."""
    if window == 1:  # exactly, without the rounding of sums
        return np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = _bounds(len(values), window)
    return np.asarray((sums[last] - sums[first]) / (last - first), dtype=np.float64)


def chance_band(values: Sequence[float], window: int) -> Floats:
    """Return half the width [n] of the band about 0 in which a smoothed curve lies at 95 % of the
    steps, if its values are independent, of mean 0, and spread like `values`.

    Their spread is estimated from differences of neighbours, which a slow trend leaves alone.
    """
    differences = np.diff(values)
    sigma = math.sqrt(float(np.mean(differences**2)) / 2) if len(differences) else 0.0
    first, last = _bounds(len(values), window)
    return np.asarray(1.96 * sigma / np.sqrt(last - first), dtype=np.float64)


def _bounds(count: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places, half = np.arange(count), window // 2
    return np.maximum(places - half, 0), np.minimum(places + half + 1, count)


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences."""

    mean: float
    stderr: float | None
    """None for a single pair."""
    chance: float
    """Share of the ways to swap the two of each pair that give a mean as far from 0 (sign-flip
    test): how often luck alone does this.
    """
    n: int

    @property
    def certainty(self) -> str:
        """In words."""
        if self.chance < SURE:
            return "sure"
        return "likely" if self.chance < LIKELY else "could be luck"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare `ours` less `theirs`, pair by pair; one pair or more."""
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Difference(float(differences.mean()), error, _chance(differences), n)


def _chance(differences: Floats) -> float:
    n, observed = len(differences), abs(float(differences.sum()))
    if n <= EXACT_UP_TO:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(DRAWS, n))
        extra = 1  # the observed signs themselves, which were not drawn
    as_far = np.abs(signs @ differences) >= observed * (1 - 1e-9)
    return float((as_far.sum() + extra) / (len(signs) + extra))
