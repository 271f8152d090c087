"""Warns, once, when LensNet does not learn: when its correlation with the losses is not below that
of a control score, which depends on the LOD only.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

WINDOW = 100
"""Most steps over which the check averages."""
MARGIN = 0.02
"""Difference by which LensNet's mean correlation must be below the control's."""
SIGMAS = 3.0
"""The same difference in standard errors; both conditions must hold."""
SAME_LOSSES = 0.02
"""Spread of the variants' losses, in nats, below which there is nothing to learn."""
SAME_SCORES = 1e-4
"""Standard deviation of LensNet's scores (from -1 to 1) within a row below which they count as
equal.
"""


class _Step(NamedTuple):
    """The metrics kept of a step; 0 for those that are missing or not finite."""

    difference: float
    """LensNet's correlation minus the control's."""
    losses: float
    """Spread of the losses of a sequence's variants, nats."""
    scores: float
    """Spread of LensNet's scores within a row."""


class LensMonitor:
    """Compares `mc/preference_corr_mean` with `mc/preference_corr_lod_only`, once, after `patience`
    steps of LensNet; 0: never.

    Steps without LensNet do not count. A step without a correlation, because all scores or all
    variants are equal, counts as a correlation of 0.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._window: deque[_Step] = deque(maxlen=min(WINDOW, patience))
        self._steps = 0
        self._judged = False

    def observe(self, record: Mapping[str, float]) -> str | None:
        """Take a step's record; return the warning when it is due, at most once."""
        ran = "mc/policy_score_std_mean" in record  # wherever LensNet ran
        if self._judged or not self._patience or not ran:
            return None
        self._steps += 1
        keys = (
            "mc/preference_corr_mean",
            "mc/preference_corr_lod_only",
            "mc/horizon_spread",
            "mc/policy_score_std_mean",
        )
        corr, control, losses, scores = (_finite(record.get(key, 0.0)) for key in keys)
        self._window.append(_Step(corr - control, losses, scores))
        if self._steps < self._patience:
            return None
        self._judged = True
        warning = None if self._has_learnt() else self._warning()
        self._window.clear()
        return warning

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, those of the window, and whether the check was made, for a
        checkpoint.
        """
        return {
            "steps": self._steps,
            "judged": self._judged,
            "window": [list(step) for step in self._window],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._steps, self._judged = int(state["steps"]), bool(state["judged"])
        self._window.clear()
        self._window.extend(_Step(*step) for step in state["window"])

    def _has_learnt(self) -> bool:
        differences = [step.difference for step in self._window]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return fmean(differences) < -max(MARGIN, SIGMAS * error)

    def _warning(self) -> str:
        difference, losses, scores = (fmean(column) for column in zip(*self._window, strict=True))
        if losses < SAME_LOSSES:
            cause = (
                f"the variants' scores hardly differ (mc/horizon_spread = {losses:.3g} nats):"
                " detail does not matter yet, start LensNet later, compress more, or use a task"
                " whose answers a gist cannot hold"
            )
        elif scores < SAME_SCORES:
            cause = (
                f"LensNet's scores are all equal (mc/policy_score_std_mean = {scores:.3g}): raise"
                " lens_lr where they are near 0; lower it or lengthen lens_warmup_steps where"
                " mc/policy_score_abs_mean is near 1, so that tanh is saturated"
            )
        else:
            cause = (
                "gains differ but LensNet does not follow: lower lens_lr, lengthen"
                " lens_warmup_steps, check lens_ask and lens_index"
            )
        return (
            f"warning: after {self._steps} steps of LensNet mc/preference_corr_mean is not below"
            f" its LOD-only control ({difference:+.3f} apart over the last {len(self._window)}):"
            f" {cause}"
        )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
