"""What a run reports: `metrics.jsonl` (the record), its Weights & Biases mirror, a progress bar.
Rank 0 only.
"""

from mc_ds.training.telemetry.jsonl import MetricsWriter
from mc_ds.training.telemetry.progress import ProgressBar
from mc_ds.training.telemetry.wandb_mirror import WandbMirror

__all__ = ["MetricsWriter", "ProgressBar", "WandbMirror"]
