"""Detects steps with non-finite losses or gradients, and spikes of the loss."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_ds.config import HealthConfig
from mc_ds.storage import replace_text
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import gather, on_main, rank_and_world
from mc_ds.training.step import StepResult

WARM_UP_STEPS = 20
"""Number of losses needed before spikes are detected."""


class BadSteps:
    """Counts consecutive bad (non-finite) steps, and writes samples and losses of all ranks to
    `bad_steps/step_N.json`.

    `StepResult.finite` comes from reduced gradients, so all ranks agree without another collective.
    """

    def __init__(self, folder: Path, config: HealthConfig) -> None:
        self.folder, self.max_bad_steps = folder / "bad_steps", config.max_bad_steps
        self.in_a_row = 0

    def check(self, step: int, result: StepResult) -> None:
        """Count `step` if it is bad. Raises RunStopped after `max_bad_steps` consecutive bad steps.

        A collective if the step is bad.
        """
        if result.finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        mine = {
            "rank": rank_and_world()[0],
            "micro_steps": [
                {"sample_ids": ids.tolist(), "loss": _json_number(float(loss))}
                for ids, loss in zip(result.sample_ids, result.losses, strict=True)
            ],
            "metrics": {key: _json_number(value) for key, value in result.host.items()},
        }
        ranks = gather(mine)
        on_main(lambda: self._record(step, ranks), doing="the record of a bad step")
        if self.in_a_row >= self.max_bad_steps:
            raise RunStopped(
                f"{self.in_a_row} consecutive steps had a non-finite loss or gradient"
                f" (health.max_bad_steps), the last was step {step}: see their samples and losses"
                f" in {self.folder}; lower the learning rate or check the data, then resume from"
                " the last checkpoint",
                ExitCode.UNHEALTHY,
                on_all_ranks=True,
            )

    def _record(self, step: int, ranks: list[dict[str, Any]]) -> None:
        self.folder.mkdir(exist_ok=True)
        content = json.dumps({"step": step, "ranks": ranks}, indent=1) + "\n"
        replace_text(self.folder / f"step_{step:08d}.json", content)


class LossSpikes:
    """Compares each loss with its exponential running mean and standard deviation.

    The averages cover about `loss_spike_window` steps. Detection is after the step, so a spike only
    warns.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.sigmas, self.decay = config.loss_spike_sigmas, 1 - 1 / config.loss_spike_window
        self.mean = self.variance = 0.0
        self.count = 0

    def check(self, record: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics `train/loss_spike` (1 or 0) and `train/loss_sigmas` (distance from the
        mean in standard deviations) for a step's record.
        """
        loss = record.get("train/loss")
        if not self.sigmas or loss is None or not math.isfinite(loss):
            return {}
        deviation = math.sqrt(self.variance)
        sigmas = (
            (loss - self.mean) / deviation if self.count >= WARM_UP_STEPS and deviation > 0 else 0.0
        )
        spike = sigmas > self.sigmas
        # Clamp spikes, so that one does not hide the next.
        self._update(min(loss, self.mean + self.sigmas * deviation) if spike else loss)
        return {"train/loss_spike": float(spike), "train/loss_sigmas": sigmas}

    def state_dict(self) -> dict[str, float]:
        """Return the running statistics, for a checkpoint."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.mean, self.variance, self.count = (
            float(state["mean"]),
            float(state["variance"]),
            int(state["count"]),
        )

    def _update(self, loss: float) -> None:
        self.count += 1
        share = max(1 - self.decay, 1 / self.count)  # a plain mean until the window is full
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
