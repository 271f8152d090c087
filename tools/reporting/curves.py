"""Which metrics share a chart, and how to read it. Only what is comparable stands together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOSS = "nats per token"


@dataclass(frozen=True)
class ChartSpec:
    """A chart and its metrics."""

    name: str
    title: str
    note: str
    unit: str
    metrics: Sequence[tuple[str, str]]
    """(key, label); a key that ends in braces stands for all of its kind, each labelled by what
    stands there.
    """
    chance_of: str = ""
    """The metric whose spread the band of chance is estimated from."""
    line: tuple[float, str] | None = None
    hidden_at_zero: bool = False
    """Whether a curve that is 0 throughout says nothing."""
    less: str = ""
    """What stands in the braces of the metric whose value is taken off the others of its kind."""

    def keys(self, known: Sequence[str]) -> list[tuple[str, str]]:
        """Return the metrics among the `known` keys of a run, with their labels."""
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
        """Return the metric that is taken off; empty where none is."""
        return self.metrics[0][0].partition("{")[0] + self.less if self.less else ""


CHARTS = (
    ChartSpec(
        "loss",
        "Does the model learn?",
        "Next-token loss, lower is better: of the batch in training, and of the same held-out"
        " sequences every time.",
        LOSS,
        [("train/loss", "training"), ("val/loss", "held out")],
    ),
    ChartSpec(
        "policies",
        "Who chooses the context best?",
        "Held-out loss of the horizon less that of the recency window, the same targets under every"
        " policy: **below 0 is better than recency**. LensNet works where lens lies below random"
        " and blind too. full reads everything. Few sequences: see the evaluation for errors.",
        LOSS,
        [("val/horizon_loss/{policy}", "")],
        line=(0.0, "recency"),
        less="recency",
    ),
    ChartSpec(
        "hit_rate",
        "Does it open what is asked for?",
        "Share of the spans that matter that a policy's context holds token by token.",
        "share",
        [("val/hit_rate/{policy}", "")],
    ),
    ChartSpec(
        "preference",
        "Does LensNet prefer what helps?",
        "Correlation of LensNet's preferences with what moves of detail did to the loss:"
        " **below 0 is right**. The control knows levels alone. A LensNet that knows nothing stays"
        " in the grey band at 95 % of the steps.",
        "correlation",
        [
            ("mc/preference_corr_mean", "LensNet"),
            ("mc/preference_corr_lod_only", "control: levels alone"),
        ],
        chance_of="mc/preference_corr_mean",
    ),
    ChartSpec(
        "lens_loss",
        "LensNet's loss",
        "Loss of the preferences; ln 2 = 0.693 is a coin. It is noisy by nature: judge by the"
        " correlation.",
        "",
        [("mc/lens_loss", "preference loss")],
        line=(math.log(2), "a coin"),
    ),
    ChartSpec(
        "advantage",
        "What could focus win?",
        "Loss of a random context less that of the recency window. Above 0 the window is better."
        " The spread between random contexts of one sequence is what focus can win.",
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
        "What an entry of each level predicts: the token after its span. Gists are harder, and"
        " should fall too.",
        LOSS,
        [("mc/lod_loss/{0,1,2}", "LOD")],
    ),
    ChartSpec(
        "lod_count",
        "Entries by level of detail",
        "In a random context of training. LOD0 are tokens, LOD1 gists, LOD2 gists of gists.",
        "entries",
        [("mc/lod_count/{0,1,2}", "LOD")],
    ),
    ChartSpec(
        "throughput",
        "How fast is it?",
        "Original tokens per second, and entries read for them.",
        "per second",
        [("train/tokens_per_s", "tokens"), ("train/entries_per_s", "entries")],
    ),
    ChartSpec(
        "mfu",
        "How much of the hardware is used?",
        "MFU: the model's own arithmetic as a share of the hardware's peak.",
        "share",
        [("train/mfu", "MFU")],
    ),
    ChartSpec(
        "memory",
        "GPU memory",
        "The most allocated since the start.",
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
