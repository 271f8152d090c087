"""The data's curriculum: decides by measurements when the next stage begins.

Every `interval` steps, the spread or the mean of the horizon losses, reduced over all ranks, may
trigger the next stage. It takes effect `delay_steps` later, after all batches that loaders have
already prefetched, so that ranks, workers and restarts agree. Checkpoints contain the changes of
stage, including a pending one.
"""

from typing import Any

from mc_ds.config.errors import ConfigError
from mc_ds.config.run import CurriculumConfig


class Curriculum:
    """Stages 0 .. num_stages - 1 of the training data."""

    def __init__(self, config: CurriculumConfig, *, num_stages: int) -> None:
        self.config, self.num_stages = config, num_stages
        self._changes: list[tuple[int, int]] = [(0, 0)]

    def stage_at(self, step: int) -> int:
        """Return the stage of optimizer step `step`.

        Final for steps up to `delay_steps` after the last observed one.
        """
        return next(stage for start, stage in reversed(self._changes) if start <= step)

    def end_step(self) -> int | None:
        """Return the first step of the last stage; None while it is not known."""
        start, stage = self._changes[-1]
        return start if stage == self.num_stages - 1 else None

    def wants(self, steps_done: int) -> bool:
        """Return whether to `observe` after `steps_done` steps: at every interval, if the last step
        belongs to the current stage.
        """
        config, (start, _) = self.config, self._changes[-1]
        is_due = steps_done >= config.start_step and steps_done % config.interval == 0
        return self.end_step() is None and is_due and start < steps_done

    def observe(self, steps_done: int, spread: float, horizon_loss: float) -> None:
        """Schedule the next stage if `wants` returns True and the last step's spread or loss
        passes its limit.
        """
        suffices = spread > self.config.spread or horizon_loss < self.config.horizon_loss
        if self.wants(steps_done) and suffices:
            self._changes.append((steps_done + self.config.delay_steps, self._changes[-1][1] + 1))

    def check_prefetch(self, steps_ahead: float) -> None:
        """Raise ConfigError if loaders prefetch more steps than `delay_steps`."""
        if self.num_stages > 1 and self.config.delay_steps <= steps_ahead:
            raise ConfigError(
                f"curriculum.delay_steps = {self.config.delay_steps} must exceed the"
                f" {steps_ahead:g} steps that loaders prefetch: use at least"
                f" {int(steps_ahead) + 1}, or fewer data.num_workers"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the changes of stage so far, for a checkpoint."""
        return {"changes": [list(change) for change in self._changes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._changes = [(int(start), int(stage)) for start, stage in state["changes"]]
