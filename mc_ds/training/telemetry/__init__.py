"""What a run reports: `metrics.jsonl` (the record), its Weights & Biases mirror, a progress bar, and lines for the eye. Rank 0 only."""

from mc_ds.training.telemetry.ascii import LEGEND, lens_debug_lines, lod_ascii, lod_ascii_lines
from mc_ds.training.telemetry.jsonl import MetricsWriter
from mc_ds.training.telemetry.progress import ProgressBar
from mc_ds.training.telemetry.wandb_mirror import WandbMirror

__all__ = ["LEGEND", "MetricsWriter", "ProgressBar", "WandbMirror", "lens_debug_lines", "lod_ascii", "lod_ascii_lines"]
