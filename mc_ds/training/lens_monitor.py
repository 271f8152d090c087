"""Warns once when LensNet does not learn: its correlation does not fall below that of a score that sees the LOD alone."""

import math
from collections import deque
from collections.abc import Mapping

WINDOW = 100
"""Steps over which correlations are averaged."""
MARGIN = 0.02
"""Correlation by which LensNet must be below its control."""


class LensMonitor:
    """Watches `mc/preference_corr_mean` against `mc/preference_corr_lod_only`."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._differences: deque[float] = deque(maxlen=WINDOW)
        self._steps = 0
        self._done = patience == 0

    def observe(self, record: Mapping[str, float]) -> str | None:
        """Takes a step's record; returns the warning when it is due, at most once."""
        corr, control = record.get("mc/preference_corr_mean"), record.get("mc/preference_corr_lod_only", 0.0)
        if self._done or corr is None or not math.isfinite(corr):
            return None
        self._steps += 1
        self._differences.append(corr - control)
        mean = sum(self._differences) / len(self._differences)
        if len(self._differences) == WINDOW and mean < -MARGIN:
            self._done = True
        if self._done or self._steps < max(self._patience, WINDOW):
            return None
        self._done = True
        spread = record.get("mc/adv_delta_std", 0.0)
        cause = (
            f"the variants' scores hardly differ (mc/adv_delta_std = {spread:.3g} nats): detail does not matter yet, start LensNet later, "
            "compress more, or use a task whose answers a gist cannot hold"
            if spread < 0.02
            else "gains differ but LensNet does not follow: lower lens_lr, lengthen lens_warmup_steps, check lens_ask and lens_index"
        )
        return f"warning: after {self._steps} steps mc/preference_corr_mean is not below its LOD-only control ({mean:+.3f} apart): {cause}"
