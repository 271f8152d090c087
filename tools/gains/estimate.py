"""Losses of chosen sets, estimated from the gains of their single blocks.

The gain of one block was measured. The gain of several is estimated as a linear function of their
best gain and of the sums of their positive and negative gains. It is fitted, for each size, to
measured sets of other policies. `left_out_errors` gives its error for a policy that it was not
fitted to.

Legend: N windows, S slices, M distant blocks, P policies, Z sizes.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gains.tables import clustered, line

Floats = NDArray[np.float64]


def chosen_gains(scores_NSM: Floats, gains_NSM: Floats, size: int) -> Floats:
    """Return the gains of the `size` best blocks by score, best score first [N, S, size]."""
    best = np.argsort(-scores_NSM, axis=-1, kind="stable")[..., :size]
    return np.take_along_axis(gains_NSM, best, axis=-1)


def set_features(gains_NSZ: Floats) -> Floats:
    """Return the features of a set [N, S, 4]: 1, its best gain, the sums of its positive and
    negative gains.
    """
    positive, negative = gains_NSZ.clip(min=0).sum(-1), gains_NSZ.clip(max=0).sum(-1)
    return np.stack([np.ones_like(positive), gains_NSZ.max(-1), positive, negative], axis=-1)


def fit_law(sets: Sequence[Floats], measured: Sequence[Floats]) -> Floats:
    """Return least squares of measured set gains [N, S] on the features of chosen gains [N, S,
    size].
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
    """Return the lines of losses minus the recency window's: of one block measured, of more blocks
    estimated.

    `measured` has set gains [N, S, Z] of policies with scores; the oracle's are not fitted to.
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
    """Return the lines of estimated minus measured set gains; the law is fitted to the other
    policies but the oracle.
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
    """Return lines with the loss of each policy's best block minus that of policy `against`."""
    base = chosen_gains(scores[against], gains, 1)[..., 0]
    for name, table in scores.items():
        if name != against:
            mean, error = clustered(base - chosen_gains(table, gains, 1)[..., 0])
            yield f"{name:24s} {mean:+.4f} ± {error:.4f}"
