"""The charts of training curves: which metrics each has, and its explanation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOSS = "nats per token"


@dataclass(frozen=True)
class ChartSpec:
    """A chart's title, explanation and metrics."""

    name: str
    title: str
    note: str
    unit: str
    metrics: Sequence[tuple[str, str]]
    """(key, label). A key that ends in braces stands for all keys with that prefix; the rest of the
    key is then the label.
    """
    chance_of: str = ""
    """Metric from whose noise the chance band is estimated."""
    line: tuple[float, str] | None = None
    """A reference level and its label."""
    hidden_at_zero: bool = False
    """Whether to hide a curve that is always 0."""
    less: str = ""
    """Suffix of the key, among those in braces, that is subtracted from the others."""

    def keys(self, known: Sequence[str]) -> list[tuple[str, str]]:
        """Return (key, label) of the chart's metrics that are among the keys `known` of a run."""
        found: list[tuple[str, str]] = []
        for key, label in self.metrics:
            stem, braces, _ = key.partition("{")
            if braces:
                kinds = [name.removeprefix(stem) for name in known if name.startswith(stem)]
                kinds.sort(key=lambda kind: kind != "lens")
                found += [(stem + kind, label + kind) for kind in kinds if kind != self.less]
            elif key in known:
                found.append((key, label))
        return found

    @property
    def baseline(self) -> str:
        """Key of the metric that is subtracted; empty if none is."""
        return self.metrics[0][0].partition("{")[0] + self.less if self.less else ""


CHARTS = (
    ChartSpec(
        "loss",
        "Does the model learn?",
        "Next-token loss, lower is better: of the training batches, and of held-out sequences (the"
        " same ones each time).",
        LOSS,
        [("train/loss", "training"), ("val/loss", "held out")],
    ),
    ChartSpec(
        "policies",
        "Which policy chooses the best context?",
        "Held-out loss on the horizon minus that of the recency window, on the same targets:"
        " **below 0 is better than recency**. LensNet works if lens is also below random and blind."
        " full reads everything. There are few sequences; evaluations have error estimates.",
        LOSS,
        [("val/horizon_loss/{policy}", "")],
        line=(0.0, "recency"),
        less="recency",
    ),
    ChartSpec(
        "hit_rate",
        "Does it open the facts asked for?",
        "Share of the relevant spans that are uncompressed in a policy's context.",
        "share",
        [("val/hit_rate/{policy}", "")],
    ),
    ChartSpec(
        "preference",
        "Do LensNet's preferences lower the loss?",
        "Correlation of LensNet's preferences with the changes of the loss: **below 0 is right**."
        " The control depends on levels of detail only. An untrained LensNet is in the grey band"
        " at 95 % of the steps.",
        "correlation",
        [
            ("mc/preference_corr_mean", "LensNet"),
            ("mc/preference_corr_lod_only", "control: levels only"),
        ],
        chance_of="mc/preference_corr_mean",
    ),
    ChartSpec(
        "lens_loss",
        "LensNet's loss",
        "Preference loss; guessing gives ln 2 = 0.693. It is very noisy: look at the correlation"
        " instead.",
        "",
        [("mc/lens_loss", "preference loss")],
        line=(math.log(2), "guessing"),
    ),
    ChartSpec(
        "advantage",
        "How much could focus gain?",
        "Loss of a random context minus that of the recency window: above 0 the window is better."
        " The spread between random contexts of one sequence estimates what focus can gain.",
        LOSS,
        [
            ("mc/adv_delta_mean", "mean difference"),
            ("mc/adv_delta_p95", "95th percentile"),
            ("mc/horizon_spread", "spread between contexts"),
        ],
        line=(0.0, "as good as recency"),
    ),
    ChartSpec(
        "lod_loss",
        "Loss by level of detail",
        "Next-token loss of the entries at each level: they predict the token after their span. It"
        " is higher for gists, but should fall too.",
        LOSS,
        [("mc/lod_loss/{0,1,2}", "LOD")],
    ),
    ChartSpec(
        "lod_count",
        "Entries by level of detail",
        "Number in a random training context: LOD0 tokens, LOD1 gists, LOD2 gists of gists.",
        "entries",
        [("mc/lod_count/{0,1,2}", "LOD")],
    ),
    ChartSpec(
        "throughput",
        "How fast is training?",
        "Tokens of the sequences per second, and entries of all their rows.",
        "per second",
        [("train/tokens_per_s", "tokens"), ("train/entries_per_s", "entries")],
    ),
    ChartSpec(
        "mfu",
        "How much of the hardware is used?",
        "MFU (model FLOPs utilisation): the model's operations as a share of the hardware's peak.",
        "share",
        [("train/mfu", "MFU")],
    ),
    ChartSpec(
        "memory",
        "GPU memory",
        "Peak of allocated memory since the start.",
        "GB",
        [("train/peak_memory_gb", "peak")],
        hidden_at_zero=True,
    ),
)
STEP_PARTS = (
    ("train/data_wait_ms", "waiting for data"),
    ("train/forward_ms", "forward"),
    ("train/backward_ms", "backward"),
    ("mc/lens_forward_ms", "LensNet forward"),
    ("mc/lens_loss_ms", "preference loss"),
    ("mc/lens_backward_ms", "LensNet backward"),
)
"""Parts of `train/step_ms`, with their labels."""
