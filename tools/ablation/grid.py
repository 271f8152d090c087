"""Runs trials side by side: trainings on free slots, the evaluations of each as soon as it has ended, and every result kept at once.

A slot is a place for one process, on one GPU where there are any. Evaluations go before further trainings, so that a call whose time is up
leaves whole rows. What fails or takes too long is a result like any other; what the end of the call interrupts is none.
"""

import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from ablation.jobs import Outcome, State, Stop, run_command
from ablation.plan import Plan
from ablation.results import (
    EvaluationResult,
    GroupEntry,
    Provenance,
    Results,
    RowEntry,
    TrialResult,
    read_records,
    training_metrics,
)
from ablation.trials import Evaluation, Grid, Trial
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.recipe import to_yaml
from mc_ds.data import prepare_corpus
from mc_ds.model.lensnet import LensNet
from mc_ds.storage import replace_text

THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Variables that keep processes side by side from each taking all cores; what is set already stays."""


@dataclass(frozen=True)
class Programs:
    """The programs that trials are run with."""

    train: Path
    evaluate: Path


@dataclass(frozen=True)
class _Task:
    """One command: the training of a trial, or (with `evaluation`) an evaluation of it."""

    trial: Trial
    evaluation: Evaluation | None
    command: list[str]
    log: Path

    def __str__(self) -> str:
        return f"{self.trial.name}: {'training' if self.evaluation is None else ' '.join(self.evaluation.options)}"


class GridRunner:
    """Runs trials into `results`, which is saved in `out` after every command."""

    def __init__(
        self,
        results: Results,
        out: Path,
        programs: Programs,
        made: Provenance,
        *,
        gpus: Sequence[str],
        timeout_s: float,
        stop: Stop,
        remove_checkpoints: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        """`gpus` are dealt to the `made.jobs` slots in turn; none: the processes find their device. `timeout_s` is for each command."""
        self.results, self.out, self.programs, self.made = results, out, programs, made
        self.timeout_s, self.stop, self.remove_checkpoints, self.report = (
            timeout_s,
            stop,
            remove_checkpoints,
            report,
        )
        self._slots = [gpus[index % len(gpus)] if gpus else None for index in range(made.jobs)]

    def run(self, trials: Iterable[Trial]) -> None:
        """Runs what is not known yet of `trials`; returns when all has ended, or the call is to stop."""
        ready = deque(task for trial in trials for task in self._open_tasks(trial))
        free, running = list(self._slots), dict[Future[Outcome], tuple[_Task, str | None]]()
        self.report(f"{len(ready)} commands to begin with, {len(free)} at a time")
        with ThreadPoolExecutor(max_workers=len(free)) as pool:
            while ready or running:
                while ready and free and not self.stop:
                    task, gpu = ready.popleft(), free.pop(0)
                    self.report(f"starts   {task}")
                    running[pool.submit(self._execute, task, gpu)] = (task, gpu)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, gpu = running.pop(future)
                    free.append(gpu)
                    ready.extendleft(reversed(self._finish(task, future.result())))
        if self.stop and ready:
            self.report(f"stopped with {len(ready)} commands not begun: the same command goes on")

    def _open_tasks(self, trial: Trial) -> list[_Task]:
        """What has to be done first for a trial: its training, or evaluations of a trained one, or nothing."""
        missing = [
            e for e in trial.evaluations.values() if not self.results.finished(trial.key, e.key)
        ]
        if not missing:
            self.report(f"known    {trial.name}")
            return []
        known = self.results.trials.get(trial.key)
        if (
            known is not None
            and known.state is State.FINISHED
            and _has_checkpoint(self.out / "runs" / known.name)
        ):
            trial.config = trial.config.model_copy(update={"name": known.name})
            trial.name = known.name
            return [self._evaluation(trial, evaluation) for evaluation in missing]
        return [self._training(trial)]

    def _training(self, trial: Trial) -> _Task:
        recipe = self.out / "recipes" / f"{trial.name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        replace_text(recipe, to_yaml(trial.config))
        command = [sys.executable, str(self.programs.train), "--config", str(recipe)]
        return _Task(trial, None, command, self.out / "logs" / f"{trial.name}.train.log")

    def _evaluation(self, trial: Trial, evaluation: Evaluation) -> _Task:
        stem = f"{trial.name}.{evaluation.key}"
        command = [
            sys.executable,
            str(self.programs.evaluate),
            "--checkpoint",
            str(self.out / "runs" / trial.name),
            *evaluation.options,
        ]
        command += ["--out", str(self._records(trial, evaluation))]
        return _Task(trial, evaluation, command, self.out / "logs" / f"{stem}.log")

    def _records(self, trial: Trial, evaluation: Evaluation) -> Path:
        return self.out / "evaluations" / f"{trial.name}.{evaluation.key}.json"

    def _execute(self, task: _Task, gpu: str | None) -> Outcome:
        environ = dict(os.environ)
        for variable in THREADS:
            environ.setdefault(
                variable, str(max(1, len(os.sched_getaffinity(0)) // len(self._slots)))
            )
        if gpu is not None:
            environ["CUDA_VISIBLE_DEVICES"] = gpu
        if task.evaluation is None:
            shutil.rmtree(
                self.out / "runs" / task.trial.name, ignore_errors=True
            )  # what an earlier call was interrupted in
        else:
            records = self._records(task.trial, task.evaluation)
            records.parent.mkdir(parents=True, exist_ok=True)
            records.unlink(missing_ok=True)
        return run_command(
            task.command, log=task.log, environ=environ, timeout_s=self.timeout_s, stop=self.stop
        )

    def _finish(self, task: _Task, outcome: Outcome) -> list[_Task]:
        """Keeps what a command gave; returns what can be done now."""
        if outcome.state is State.STOPPED:
            return []
        trial, key = task.trial, task.trial.key
        command = " ".join(_shown(task.command))
        if task.evaluation is None:
            result, outcome = self._trained(trial, command, outcome)
            self.results.trials[key] = result
        else:
            evaluated = self._evaluated(trial, task.evaluation, command, outcome)
            self.results.trials[key].evaluations[task.evaluation.key] = evaluated
            outcome = Outcome(evaluated.state, outcome.seconds, evaluated.reason)
        self.results.save(self.out / "results.json")
        self.report(f"{outcome.state:8} {task}, {outcome.seconds:.0f} s {outcome.reason}".rstrip())
        if task.evaluation is None:
            return (
                [self._evaluation(trial, e) for e in trial.evaluations.values()]
                if outcome.state is State.FINISHED
                else []
            )
        if self.remove_checkpoints and all(
            self.results.finished(key, wanted) for wanted in trial.evaluations
        ):
            shutil.rmtree(self.out / "runs" / trial.name / "checkpoints", ignore_errors=True)
        return []

    def _trained(self, trial: Trial, command: str, outcome: Outcome) -> tuple[TrialResult, Outcome]:
        metrics: dict[str, float] = {}
        if outcome.state is State.FINISHED:
            try:
                metrics = training_metrics(self.out / "runs" / trial.name)
            except (OSError, ValueError) as error:
                outcome = Outcome(
                    State.FAILED, outcome.seconds, f"its record cannot be read: {error}"
                )
        train = trial.config.train
        result = TrialResult(
            name=trial.name,
            state=outcome.state,
            reason=outcome.reason,
            seconds=outcome.seconds,
            command=command,
            recipe=trial.recipe,
            init_from=trial.config.train.init_from,
            seed=trial.config.seed,
            steps=train.total_steps,
            sequences=train.total_steps * train.global_batch_size,
            parameters=lens_parameters(trial.config),
            metrics=metrics,
            made=self.made,
        )
        return result, outcome

    def _evaluated(
        self, trial: Trial, evaluation: Evaluation, command: str, outcome: Outcome
    ) -> EvaluationResult:
        state, reason, records = outcome.state, outcome.reason, []
        if state is State.FINISHED:
            try:
                records = read_records(self._records(trial, evaluation))
            except (OSError, ValueError) as error:
                state, reason = State.FAILED, f"its records cannot be read: {error}"
        made = None if self.results.trials[trial.key].made == self.made else self.made
        return EvaluationResult(
            state=state,
            reason=reason,
            seconds=outcome.seconds,
            command=command,
            records=records,
            made=made,
        )


def prepare_data(trials: Iterable[Trial]) -> None:
    """Prepares the trials' data, each once: their trainings would wait for each other. Raises ConfigError for data that cannot be used."""
    for config in {
        trial.config.data.model_dump_json(): trial.config.data for trial in trials
    }.values():
        try:
            prepare_corpus(config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the data cannot be used: {error}") from error


def show_rows(results: Results, plan: Plan, grid: Grid) -> None:
    """Makes the groups of `grid` in `results` show its rows, those that are not wanted now too."""
    results.order = [*plan.groups, *(name for name in results.order if name not in plan.groups)]
    for name, rows in grid.rows.items():
        group = plan.groups[name]
        results.groups[name] = GroupEntry(
            question=group.question,
            rows=[
                RowEntry(label=row.label, trials=row.trials, evaluation=row.evaluation)
                for row in rows
            ],
        )


def lens_parameters(config: RunConfig) -> int:
    """Parameters of a run's LensNet."""
    with torch.device("meta"):
        return sum(
            parameter.numel()
            for parameter in LensNet(config.mc, dim=config.backbone.dim).parameters()
        )


def _has_checkpoint(run: Path) -> bool:
    checkpoints = run / "checkpoints"
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _shown(command: Sequence[str]) -> list[str]:
    """The command as one would type it: `python`, and paths below the present folder relative to it."""
    here = f"{Path.cwd()}{os.sep}"
    return ["python", *(part.removeprefix(here) for part in command[1:])]
