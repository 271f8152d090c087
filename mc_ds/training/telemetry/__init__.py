"""What a run reports: `metrics.jsonl` (the record), its mirrors in Weights & Biases and
TensorBoard, the screen and its log. Rank 0 only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_ds.config import RunConfig
from mc_ds.training.telemetry.jsonl import MetricsWriter
from mc_ds.training.telemetry.mirrors import Mirror
from mc_ds.training.telemetry.screen import Screen
from mc_ds.training.telemetry.tensorboard_sink import TensorBoard
from mc_ds.training.telemetry.wandb_sink import WeightsAndBiases

__all__ = ["MetricsWriter", "Mirror", "Screen", "open_mirrors"]


def open_mirrors(
    config: RunConfig, run_dir: Path, facts: Mapping[str, Any], *, start_step: int = 0
) -> list[Mirror]:
    """Open the mirrors that the config asks for. `facts` of the run stand beside its config where
    the mirror has a place for them; `start_step` steps were done before.
    """
    mirrors = []
    if config.telemetry.wandb:
        mirrors.append(
            Mirror(
                "Weights & Biases",
                lambda: WeightsAndBiases.start(config, run_dir, facts, start_step=start_step),
            )
        )
    if config.telemetry.tensorboard:
        mirrors.append(
            Mirror("TensorBoard", lambda: TensorBoard(config, run_dir, start_step=start_step))
        )
    return mirrors
