"""What a run reports: `metrics.jsonl` (the record), its Weights & Biases mirror, the screen and its
log. Rank 0 only.
"""

from mc_ds.training.telemetry.jsonl import MetricsWriter
from mc_ds.training.telemetry.screen import Screen
from mc_ds.training.telemetry.wandb_mirror import WandbMirror

__all__ = ["MetricsWriter", "Screen", "WandbMirror"]
