"""Outputs of a run, on rank 0: `metrics.jsonl`, its mirrors in Weights & Biases and TensorBoard,
the screen and its log.
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
    """Open the mirrors that the config enables.

    `facts` about the run are added to its config in Weights & Biases. `start_step` is the step from
    which the run resumes.
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
