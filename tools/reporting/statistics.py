"""Statistics for reports: running means, chance bands, and tests of paired differences.

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
"""Minimum number of values of a curve that is smoothed."""
WINDOWS = 10
"""A smoothing window covers about 1/WINDOWS of the curve."""
EXACT_UP_TO = 12
"""Maximum pairs for an exact sign-flip test; with more, DRAWS random sign vectors are used."""
DRAWS = 20_000
SURE, LIKELY = 0.01, 0.05
"""p-values below which a difference is called "sure" and "likely"."""


def window_of(count: int) -> int:
    """Return the smoothing window for a curve of `count` values, an odd number; 1: no smoothing."""
    return 1 if count < SMOOTHED_FROM else count // WINDOWS // 2 * 2 + 1


def smoothed(values: Sequence[float], window: int) -> Floats:
    """Return the running mean [n] over `window` values, fewer at both ends."""
    if window == 1:  # avoid the rounding of sums
        return np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = _bounds(len(values), window)
    return np.asarray((sums[last] - sums[first]) / (last - first), dtype=np.float64)


def chance_band(values: Sequence[float], window: int) -> Floats:
    """Return the half width [n] of the 95 % band around 0 of a running mean of pure noise.

    The noise is as strong as that of `values`, estimated from differences of neighbours so that a
    slow trend does not count.
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
    """The mean of paired differences, with a sign-flip test."""

    mean: float
    stderr: float | None
    """None for a single pair."""
    chance: float
    """p-value of the sign-flip test: how often random signs of the differences give a mean at least
    as far from 0.
    """
    n: int
    """Number of pairs."""

    @property
    def certainty(self) -> str:
        """The p-value in words."""
        if self.chance < SURE:
            return "sure"
        return "likely" if self.chance < LIKELY else "could be luck"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Test the paired differences `ours` - `theirs` (at least one pair)."""
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
        extra = 1  # count the observed signs too
    as_far = np.abs(signs @ differences) >= observed * (1 - 1e-9)
    return float((as_far.sum() + extra) / (len(signs) + extra))
