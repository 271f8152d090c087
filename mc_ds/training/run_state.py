"""The state of a run on disk: folder, config and checkpoints.

`open` checks everything, and raises errors on all ranks before the run's folder is changed. `claim`
then writes to the folder.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed
import torch

import mc_ds
from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.config.compare import flatten
from mc_ds.config.recipe import to_yaml
from mc_ds.data import RunData, open_data
from mc_ds.storage import Lock, LockHeldError, remove_leftovers, replace_text
from mc_ds.training.checkpoint import ResumePlan, Sharding, find_checkpoint, plan_resume
from mc_ds.training.checkpoint.archive import archive
from mc_ds.training.checkpoint.beginning import beginning, last_beginning, repeats
from mc_ds.training.engine.initial import InitialWeights, open_initial
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import agreed, on_main, rank_and_world, require_equal
from mc_ds.weights.compatibility import requirements

LOCK = "lock"
"""Lock file in a run's folder, held by rank 0."""


class RunState:
    """Folder and checkpoints of one run, and the facts that must be equal on all ranks and in its
    checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        ds_config: Mapping[str, Any],
        data: RunData,
        device_type: str,
    ) -> None:
        self.folder, self.ds_config = folder, ds_config
        self.config = config.with_absolute_paths()
        """The config as stored: with absolute paths."""
        self.checkpoints = folder / "checkpoints"
        self._lock: Lock | None = None
        self.data, self.tokenizer = data, data.tokenizer
        self.requirements = requirements(
            config,
            device_type=device_type,
            tokenizer=data.tokenizer.sha256,
            data=data.identity,
        )
        self.started_from: dict[str, Any] | None = None
        """Facts about the initial weights (`train.init_from`), for checkpoints; None if random."""
        self.first_start = beginning(self.config)
        """The settings of the run's first start. Another start with equal settings resumes."""

    def facts(self) -> dict[str, Any]:
        """Return the facts about the run that are stored in its checkpoints."""
        return {
            **self._sharding()._asdict(),
            "config": self.config.model_dump(mode="json"),
            "requirements": self.requirements,
            "corpus": self.data.fingerprint,
            "first_start": self.first_start,
            "init_from": self.started_from,
            "versions": versions(),
        }

    def open(self, held: ExitStack) -> tuple[ResumePlan | None, InitialWeights | None]:
        """Lock the folder, and find the checkpoint or the initial weights to start from.

        Returns the plan for resuming, or None and the initial weights of `train.init_from`, if any.
        Makes the folder if missing; rank 0 locks it until `held` is closed; nothing else changes.
        Raises RunStopped on all ranks if their configs differ, if another run uses the folder or it
        cannot be written, or if checkpoint or weights cannot be used.
        """
        settings = {
            "deepspeed": dict(self.ds_config),
            "data": self.data.identity,
            "versions": versions(),
        }
        require_equal({**flatten(self.config.model_dump(mode="json")), **flatten(settings)})
        on_main(lambda: self._own(held), doing="the run folder")
        plan = agreed(self._plan)
        initial = (
            agreed(self._initial)
            if plan is None and self.config.train.init_from is not None
            else None
        )
        if plan is not None:
            self.started_from = plan.trainer["init_from"]
        elif initial is not None:
            self.started_from = initial.facts()
        return plan, initial

    def claim(self, plan: ResumePlan | None) -> None:
        """Write config and tokenizer to the folder, and archive checkpoints and metrics that this
        start would overwrite.

        A collective; call it after every check that could prevent the start. Raises RunStopped if
        the folder cannot be written.
        """
        on_main(lambda: self._claim(plan), doing="the run folder")

    def _claim(self, plan: ResumePlan | None) -> None:
        own = plan is not None and plan.checkpoint.parent.resolve() == self.checkpoints.resolve()
        upto = plan.checkpoint if plan is not None and own else None
        remove_leftovers(self.folder)
        earlier = archive(self.folder, upto, config=to_yaml(self.config))
        if earlier is not None:
            print(f"earlier checkpoints, metrics and config were moved to {earlier}", flush=True)
        replace_text(self.folder / "config.yaml", to_yaml(self.config))
        file = self.folder / self.tokenizer.file_name
        if not file.exists() or file.read_bytes() != self.tokenizer.content():
            self.tokenizer.save(self.folder)  # makes the folder usable as data.tokenizer

    def _sharding(self) -> Sharding:
        return Sharding.of(self.ds_config, rank_and_world()[1])

    def check_owner(self) -> None:
        """Raise RunStopped on all ranks if another run has taken the lock, as it may if this one
        was suspended for long.
        """
        on_main(self._check_lock, doing="the run folder")

    def _check_lock(self) -> None:
        assert self._lock is not None, "the run was opened"
        self._lock.check()

    def _own(self, held: ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = held.enter_context(Lock(self.folder / LOCK, report=_print))
        except LockHeldError as other:
            raise RunStopped(
                f"{self.folder} is in use by {other.owner}: wait for it, end it, or use"
                " another --name",
                ExitCode.CONFIG,
            ) from None
        self.checkpoints.mkdir(exist_ok=True)

    def _plan(self) -> ResumePlan | None:
        resume = self.config.resume
        before = on_main(lambda: last_beginning(self.checkpoints))
        repeated = before is not None and repeats(self.first_start, before)
        if repeated and rank_and_world()[0] == 0:
            print(
                f"resume = {resume} applied to this run's first start only: resuming from its own"
                " newest checkpoint (to start over, use another --name, or move"
                f" {self.checkpoints})",
                flush=True,
            )
        checkpoint = find_checkpoint("auto" if repeated else resume, self.checkpoints)
        if checkpoint is None:
            return None
        if before is not None and (repeated or resume == "auto"):
            self.first_start = before
        return plan_resume(
            checkpoint,
            self.requirements,
            sharding=self._sharding(),
            cache=self.checkpoints,
            trusted=self.config.checkpoint.trusted,
        )

    def _initial(self) -> InitialWeights:
        return open_initial(self.config, tokenizer=self.tokenizer.sha256)


def _print(line: str) -> None:
    print(line, flush=True)


def open_run_data(config: DataConfig, *, verify: bool) -> RunData:
    """Open the run's data (see `open_data`). Converts read errors to ConfigError too."""
    try:
        return open_data(config, verify=verify)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"the data cannot be used: {error}") from error


def versions() -> dict[str, str]:
    """Return the versions of the software on which a run's results depend."""
    return {
        "mc_ds": mc_ds.__version__,
        "torch": str(torch.__version__),
        "deepspeed": str(deepspeed.__version__),
    }
