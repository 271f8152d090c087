"""Checks once whether LensNet learns, and warns if not.

It learns if its scores' correlation with the losses is clearly below that of a control score, which
depends on the LOD only. (A good score is negatively correlated: more detail, lower loss.)
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

WINDOW = 100
"""Maximum steps over which the check averages."""
MARGIN = 0.02
"""Minimum difference by which LensNet's mean correlation must be below the control's."""
SIGMAS = 3.0
"""Minimum of that difference in standard errors; it must exceed both minima."""
SAME_LOSSES = 0.02
"""Spread of the variants' losses, in nats, below which there is nothing to learn."""
SAME_SCORES = 1e-4
"""Standard deviation of LensNet's scores (from -1 to 1) within a row below which they count as
equal.
"""


class _Step(NamedTuple):
    """Metrics of one step; 0 if missing or not finite."""

    difference: float
    """LensNet's correlation minus the control's."""
    losses: float
    """Spread of the losses over a sequence's variants, in nats."""
    scores: float
    """Standard deviation of LensNet's scores within a row."""


class LensMonitor:
    """Compares `mc/preference_corr_mean` with `mc/preference_corr_lod_only` once, after `patience`
    steps with LensNet (0: never).

    A step without a correlation, because all scores or all variants are equal, counts as 0.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._window: deque[_Step] = deque(maxlen=min(WINDOW, patience))
        self._steps = 0
        self._checked = False

    def observe(self, record: Mapping[str, float]) -> str | None:
        """Add a step's record. Return the warning, if any, when the check is due."""
        ran = "mc/policy_score_std_mean" in record  # only steps with LensNet have this
        if self._checked or not self._patience or not ran:
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
        self._checked = True
        warning = None if self._has_learnt() else self._warning()
        self._window.clear()
        return warning

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "steps": self._steps,
            "judged": self._checked,
            "window": [list(step) for step in self._window],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._steps, self._checked = int(state["steps"]), bool(state["judged"])
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
                f"the losses of the variants hardly differ (mc/horizon_spread = {losses:.3g} nats),"
                " so there is nothing to learn yet: start LensNet later, compress more, or use a"
                " task whose answers gists cannot represent"
            )
        elif scores < SAME_SCORES:
            cause = (
                f"LensNet's scores are all equal (mc/policy_score_std_mean = {scores:.3g}): if"
                " mc/policy_score_abs_mean is near 0, raise mc.lens_lr; if it is near 1, tanh is"
                " saturated: lower mc.lens_temperature or mc.lens_lr, or raise"
                " mc.lens_warmup_steps"
            )
        else:
            cause = (
                "the variants' losses differ, but LensNet's scores do not predict them: lower"
                " mc.lens_lr, raise mc.lens_warmup_steps, check mc.lens_ask and mc.lens_index"
            )
        return (
            f"warning: after {self._steps} steps of LensNet, mc/preference_corr_mean is not below"
            f" its LOD-only control (mean difference {difference:+.3f} over the last"
            f" {len(self._window)} steps): {cause}"
        )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
