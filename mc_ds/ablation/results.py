"""What is known about a grid: one JSON file, written anew after every command, from which the page is made and calls go on."""

import json
import os
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mc_ds.ablation.jobs import State
from mc_ds.config import ConfigError

METRICS = {
    "lens_loss": "mc/lens_loss",
    "corr": "mc/preference_corr_mean",
    "control": "mc/preference_corr_lod_only",
    "agreement": "mc/preference_agreement",
}
"""Figures of a training: means over the last fifth of LensNet's steps, each over sequences that it had not learnt from yet."""
LAST_SHARE = 5


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EvaluationResult(_Stored):
    """What one evaluation gave."""

    state: State
    reason: str = ""
    seconds: float
    command: str
    records: list[dict[str, Any]] = []
    """As `launch/evaluate.py` writes them, without the losses of single sequences."""


class Provenance(_Stored):
    """What one call of the command ran on."""

    command: str
    date: str
    """ISO, in UTC."""
    hardware: str
    versions: str
    commit: str
    jobs: int


class TrialResult(_Stored):
    """What one training gave, and the evaluations of it."""

    name: str
    state: State
    reason: str = ""
    seconds: float
    command: str
    seed: int
    steps: int
    sequences: int
    """Training sequences seen."""
    parameters: int
    """Of LensNet."""
    metrics: dict[str, float] = {}
    """The keys of METRICS."""
    made: Provenance
    evaluations: dict[str, EvaluationResult] = {}
    """By key."""


class RowEntry(_Stored):
    """A row of a table, by the keys of what it shows."""

    label: str
    trials: dict[int, str]
    """Key of the trial by seed."""
    evaluation: str


class GroupEntry(_Stored):
    """A table."""

    question: str
    base: str
    recipe: str
    init_from: str | None
    task: str
    rows: list[RowEntry]


class Results(_Stored):
    """All that calls with one output folder have found."""

    format: Literal[1] = 1
    order: list[str] = Field(default_factory=list)
    """Names of all groups of the plan, in its order."""
    groups: dict[str, GroupEntry] = Field(default_factory=dict)
    """As of the last call that selected them."""
    trials: dict[str, TrialResult] = Field(default_factory=dict)
    """By key."""

    def finished(self, trial: str, evaluation: str) -> bool:
        """Whether both have ended well."""
        known = self.trials.get(trial)
        found = known.evaluations.get(evaluation) if known is not None and known.state is State.FINISHED else None
        return found is not None and found.state is State.FINISHED

    def save(self, path: Path) -> None:
        """Writes the file, never leaving half of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """The results in `path`, empty where there are none. Raises ConfigError for a damaged file."""
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not what this command writes ({str(error).splitlines()[0]}): move it away, or use another --out"
            ) from error


def training_metrics(folder: Path) -> dict[str, float]:
    """Figures of a finished run; none where LensNet never learnt."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    learnt = [record for record in records if METRICS["lens_loss"] in record]
    last = learnt[-max(1, len(learnt) // LAST_SHARE) :]
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        values = [record[metric] for record in last if record.get(metric) is not None]
        if values:
            found[name] = statistics.fmean(values)
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an evaluation, without the losses of single sequences."""
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [{name: value for name, value in record.items() if name != "losses"} for record in records]
