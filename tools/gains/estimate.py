"""Estimates the losses of sets of blocks from the gains of single blocks.

The gain of a set is modelled as a linear function of its best single gain and of the sums of its
positive and negative ones. The function is fitted, for each set size, to the measured sets of all
policies except the oracle. `left_out_errors` gives its error for policies not used in the fit.

Legend: N windows, S slices, M distant blocks, P policies, Z sizes.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gains.tables import clustered, line

Floats = NDArray[np.float64]


def chosen_gains(scores_NSM: Floats, gains_NSM: Floats, size: int) -> Floats:
    """Return the gains [N, S, size] of the `size` blocks with the best scores, best first."""
    best = np.argsort(-scores_NSM, axis=-1, kind="stable")[..., :size]
    return np.take_along_axis(gains_NSM, best, axis=-1)


def set_features(gains_NSZ: Floats) -> Floats:
    """Return the features [N, S, 4] of sets: 1, the best gain, the sum of positive gains, the sum
    of negative gains.
    """
    positive, negative = gains_NSZ.clip(min=0).sum(-1), gains_NSZ.clip(max=0).sum(-1)
    return np.stack([np.ones_like(positive), gains_NSZ.max(-1), positive, negative], axis=-1)


def fit_law(sets: Sequence[Floats], measured: Sequence[Floats]) -> Floats:
    """Return the coefficients [4] of a least-squares fit of measured set gains, each [N, S], to the
    features of the sets' single gains, each [N, S, size].
    """
    rows = np.concatenate([set_features(chosen).reshape(-1, 4) for chosen in sets])
    law: Floats = np.linalg.lstsq(rows, np.concatenate([m.ravel() for m in measured]), rcond=None)[
        0
    ]
    return law


def estimate_lines(
    scores: Mapping[str, Floats],
    gains: Floats,
    measured: Mapping[str, Floats],
    sizes: Sequence[int],
) -> Iterator[str]:
    """Yield a line per policy with its losses minus the recency window's, for one block (measured)
    and for several (estimated).

    `measured` has set gains [N, S, Z] of some policies; those except the oracle's are used to fit.
    """
    fitted = [name for name in measured if name != "oracle"]
    sets = {size: {k: chosen_gains(s, gains, size) for k, s in scores.items()} for size in sizes}
    laws = [
        fit_law([sets[z][k] for k in fitted], [measured[k][..., i] for k in fitted])
        for i, z in enumerate(sizes)
    ]
    for name, table in scores.items():
        cells = [-chosen_gains(table, gains, 1)[..., 0]]
        cells += [-set_features(sets[z][name]) @ law for z, law in zip(sizes, laws, strict=True)]
        yield line(name, cells)


def left_out_errors(
    scores: Mapping[str, Floats],
    gains: Floats,
    measured: Mapping[str, Floats],
    sizes: Sequence[int],
) -> Iterator[str]:
    """Yield a line per policy with the estimated minus the measured gains of its sets; the estimate
    is fitted to the other policies except the oracle.
    """
    sets = {size: {k: chosen_gains(scores[k], gains, size) for k in measured} for size in sizes}
    for name in measured:
        others = [other for other in measured if other not in (name, "oracle")]
        cells = []
        for i, size in enumerate(sizes):
            law = fit_law([sets[size][k] for k in others], [measured[k][..., i] for k in others])
            cells.append(set_features(sets[size][name]) @ law - measured[name][..., i])
        yield line(name, cells)


def paired(scores: Mapping[str, Floats], gains: Floats, against: str) -> Iterator[str]:
    """Yield a line per policy with the loss of its best block minus that of policy `against`."""
    base = chosen_gains(scores[against], gains, 1)[..., 0]
    for name, table in scores.items():
        if name != against:
            mean, error = clustered(base - chosen_gains(table, gains, 1)[..., 0])
            yield f"{name:24s} {mean:+.4f} ± {error:.4f}"
