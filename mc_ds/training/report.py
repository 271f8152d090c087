"""Reports one record of metrics per step, on rank 0.

Each is written during the next step, so that nothing waits for the device. Records go to
`metrics.jsonl`, its mirrors (Weights & Biases, TensorBoard), the screen and `train.log`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mc_ds.config import RunConfig
from mc_ds.metrics import PackedMetrics
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.health import LossSpikes
from mc_ds.training.lens_monitor import LensMonitor
from mc_ds.training.run_state import versions
from mc_ds.training.step import StepResult
from mc_ds.training.telemetry import MetricsWriter, Screen, open_mirrors
from mc_ds.training.telemetry.continuations import Continuation
from mc_ds.training.telemetry.source import source_commit


@dataclass
class _Pending:
    """A step whose metrics may still be in transfer to the host."""

    step: int
    packed: PackedMetrics
    copied: torch.cuda.Event | None
    result: StepResult
    host: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """Wait for the transfer and return the step's metrics."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host | self.result.timers.read() | self.packed.record()


class Reporter:
    """Reports the run's metrics. On ranks other than 0 (`enabled` False) calls do nothing.

    `start_step` is the step from which this process resumes.
    """

    def __init__(self, config: RunConfig, folder: Path, *, enabled: bool, start_step: int) -> None:
        self._enabled = enabled
        self.spikes = LossSpikes(config.health)
        self.error: RunStopped | None = None
        """Set if `metrics.jsonl` could not be written, so that the run must stop."""
        self._pending: _Pending | None = None
        first = start_step + 1 if start_step else 0
        self._writer = MetricsWriter(folder / "metrics.jsonl", start_step=first, enabled=enabled)
        self._folder = folder
        facts = {"commit": source_commit(), "versions": versions()}
        self._mirrors = (
            open_mirrors(config, folder, facts, start_step=start_step) if enabled else []
        )
        self.monitor = LensMonitor(config.validation.lens_patience)
        self._screen = Screen(
            folder,
            config.train.total_steps,
            start_step=start_step,
            enabled=enabled,
            shows_progress=config.telemetry.progress,
        )

    def step(self, step: int, result: StepResult, host: dict[str, float]) -> None:
        """Start the transfer of a finished step's metrics, and write those of the step before."""
        if not self._enabled:
            return
        packed = result.statistics.pack()
        copied = None
        if packed.table.is_cuda:
            pinned = torch.empty(packed.table.shape, dtype=packed.table.dtype, pin_memory=True)
            packed = PackedMetrics(packed.names, pinned.copy_(packed.table, non_blocking=True))
            copied = torch.cuda.Event()
            copied.record()
        before, self._pending = self._pending, _Pending(step, packed, copied, result, host)
        self._write(before)

    def validation(
        self, step: int, metrics: dict[str, float], continuations: Sequence[Continuation] = ()
    ) -> None:
        """Print a validation's results and add them to the record of `step`, the last step.

        Before the first step they become a separate record.
        """
        if not self._enabled:
            return
        lines, texts = [validation_line(step, metrics)], dict[str, str]()
        for continuation in continuations:
            lines += continuation.lines()
            texts |= continuation.fields()
        self.text(lines)
        if self._pending is not None and self._pending.step == step:
            self._pending.host |= metrics
            self._pending.texts = texts
        else:
            self._emit(step, {**metrics, **texts})

    def text(self, lines: list[str]) -> None:
        """Print lines, and write them to the run's log."""
        self._screen.print(lines)

    def log(self, lines: list[str]) -> None:
        """Write lines to the run's log only."""
        self._screen.log(lines)

    def saved(self, step: int, line: str) -> None:
        """Show the checkpoint of `step` in the progress line, and print `line`."""
        self._screen.progress.saved = step
        self.text([line])

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics, for a checkpoint."""
        return {
            "loss_spikes": self.spikes.state_dict(),
            "lens_monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.spikes.load_state_dict(state["loss_spikes"])
        self.monitor.load_state_dict(state["lens_monitor"])

    def flush(self) -> None:
        """Write the pending record and sync `metrics.jsonl` to disk. Waits for the device."""
        before, self._pending = self._pending, None
        self._write(before)
        self._store_error_of(self._writer.sync)

    def close(self, *, exit_code: int = 0) -> None:
        """Flush and close all outputs."""
        self.flush()
        with suppress(OSError) if self.error else nullcontext():
            self._writer.close()
        for mirror in self._mirrors:
            mirror.close(self._folder, exit_code=exit_code)
        self._screen.close()

    def _write(self, pending: _Pending | None) -> None:
        if pending is not None:
            record = pending.record()
            record |= self.spikes.check(record)
            if record.get("train/loss_spike"):
                loss, sigmas = record["train/loss"], record["train/loss_sigmas"]
                self.text(
                    [
                        f"loss spike at step {pending.step}: {loss:.4f} is {sigmas:.1f} standard"
                        " deviations above the running mean"
                    ]
                )
            self._emit(pending.step, {**record, **pending.texts})
            self._screen.update(record)
            warning = self.monitor.observe(record)
            self.text([warning] if warning else [])

    def _emit(self, step: int, record: Mapping[str, float | str]) -> None:
        self._store_error_of(lambda: self._writer.write(step, record))
        for mirror in self._mirrors:
            mirror.write(step, record)

    def _store_error_of(self, action: Callable[[], None]) -> None:
        """Run `action`, which writes `metrics.jsonl`; store its error. After one, do nothing, so
        that the file has no gaps.
        """
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = RunStopped(
                    f"cannot write {self._writer.path}: {error.strerror}", ExitCode.STORAGE
                )


def validation_line(step: int, found: Mapping[str, float]) -> str:
    """Return a line with the losses of a validation."""
    policies = [
        f"{key.rpartition('/')[2]} {value:.3f}"
        for key, value in found.items()
        if key.split("/")[1] == "horizon_loss"
    ]
    horizon = f"; horizon loss by policy: {', '.join(policies)}" if policies else ""
    return f"validation after step {step}: loss {found['val/loss']:.3f}{horizon}"
