"""What is known about a grid, as one JSON file. There are two of a kind: in the output folder, written anew after every command, what calls
go on from; and beside the page, what the page is made from, into which every call merges what it has found.
"""

import json
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ablation.jobs import State
from mc_ds.config import ConfigError
from mc_ds.storage import replace_text

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


class Provenance(_Stored):
    """What one call of the command ran on."""

    command: str
    date: str
    """ISO, in UTC."""
    hardware: str
    versions: str
    commit: str
    jobs: int


class EvaluationResult(_Stored):
    """What one evaluation gave."""

    state: State
    reason: str = ""
    seconds: float
    command: str
    records: list[dict[str, Any]] = []
    """As `launch/evaluate.py` writes them, without the losses of single sequences."""
    made: Provenance | None = None
    """Empty: by the call that trained."""


class TrialResult(_Stored):
    """What one training gave, and the evaluations of it."""

    name: str
    state: State
    reason: str = ""
    seconds: float
    command: str
    recipe: str
    init_from: str | None = None
    """Weights that it started from, as given."""
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
    rows: list[RowEntry]


class Results(_Stored):
    """What calls have found."""

    format: Literal[2] = 2
    order: list[str] = Field(default_factory=list)
    """Names of all groups of the plan, in its order."""
    groups: dict[str, GroupEntry] = Field(default_factory=dict)
    """As of the last call that selected them."""
    trials: dict[str, TrialResult] = Field(default_factory=dict)
    """By key."""

    def finished(self, trial: str, evaluation: str) -> bool:
        """Whether both have ended well."""
        known = self.trials.get(trial)
        found = (
            known.evaluations.get(evaluation)
            if known is not None and known.state is State.FINISHED
            else None
        )
        return found is not None and found.state is State.FINISHED

    def merged(
        self, other: "Results", wanted: Mapping[str, Collection[str]] | None = None
    ) -> "Results":
        """These results with what `other` found, row by row; trials and evaluations that no row shows are left out.

        Where rows of one label in one group were made alike (steps, recipe, weights, evaluation), finished seeds of `other` join those
        that are here, or replace them; unfinished ones replace only what is unfinished. Otherwise its row replaces the one here if at
        least as many of its seeds are finished. `wanted`, labels by group, are the rows that may (empty: all); others only fill gaps, and
        of other groups nothing is taken. Order and questions are those of `other`; what it does not know follows.
        """
        merged = Results(order=list(dict.fromkeys([*other.order, *self.order])))
        theirs = {
            name: group for name, group in other.groups.items() if wanted is None or name in wanted
        }
        for name in dict.fromkeys([*theirs, *self.groups]):
            entry = theirs.get(name) or self.groups[name]
            found, kept = (
                {row.label: row for row in groups[name].rows} if name in groups else {}
                for groups in (theirs, self.groups)
            )
            group = merged.groups[name] = entry.model_copy(update={"rows": []})
            for label in dict.fromkeys([*found, *kept]):
                if label not in found or (
                    label in kept
                    and wanted is not None
                    and label not in wanted[name]
                    and self._runs(kept[label])
                ):
                    merged._add(group, kept[label], dict.fromkeys(kept[label].trials, self))
                elif label not in kept or not self._runs(kept[label]):
                    merged._add(group, found[label], dict.fromkeys(found[label].trials, other))
                else:
                    merged._add(group, *self._chosen(kept[label], found[label], other))
        return merged

    def _chosen(
        self, kept: RowEntry, found: RowEntry, other: "Results"
    ) -> tuple[RowEntry, dict[int, "Results"]]:
        """Of a row here, of which something has run, and that of `other`: what is shown from now on, and where each seed comes from."""
        finished = {
            seed for seed, key in found.trials.items() if other.finished(key, found.evaluation)
        }
        if kept.evaluation == found.evaluation and len(self._runs(kept) | other._runs(found)) == 1:
            ran = {seed for seed, key in found.trials.items() if key in other.trials}
            open_here = {
                seed for seed, key in kept.trials.items() if not self.finished(key, kept.evaluation)
            }
            newer = finished | (ran & open_here)
            sources = {
                seed: other if seed in newer else self for seed in sorted({*kept.trials, *finished})
            }
            trials = {
                seed: (found if source is other else kept).trials[seed]
                for seed, source in sources.items()
            }
            return kept.model_copy(update={"trials": trials}), sources
        before = sum(self.finished(key, kept.evaluation) for key in kept.trials.values())
        replaces = bool(other._runs(found)) and len(finished) >= before
        row = found if replaces else kept
        return row, dict.fromkeys(row.trials, other if replaces else self)

    def _runs(self, row: RowEntry) -> set[tuple[int, str, str | None]]:
        """How what has run of a row was made: steps, recipe, weights. Empty where nothing has."""
        trials = (self.trials[key] for key in row.trials.values() if key in self.trials)
        return {(trial.steps, trial.recipe, trial.init_from) for trial in trials}

    def _add(self, group: GroupEntry, row: RowEntry, sources: Mapping[int, "Results"]) -> None:
        """Appends a row to a group, with what the sources of its seeds know of it."""
        trials = dict(row.trials)
        for seed, key in row.trials.items():
            if key in sources[seed].trials:
                trials[seed] = self._hold(key, sources[seed].trials[key], row.evaluation)
        group.rows.append(row.model_copy(update={"trials": trials}))

    def _hold(self, key: str, trial: TrialResult, evaluation: str) -> str:
        """Takes in a training with one evaluation of it. Returns its key: with a `+` where another training of the same settings has it."""
        bare = trial.model_copy(update={"evaluations": {}})
        while (
            key in self.trials and self.trials[key].model_copy(update={"evaluations": {}}) != bare
        ):
            key += "+"
        held = self.trials.setdefault(key, bare)
        if evaluation in trial.evaluations and not self.finished(key, evaluation):
            held.evaluations[evaluation] = trial.evaluations[evaluation]
        return key

    def save(self, path: Path) -> None:
        """Writes the file, never leaving half of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, f"{self.model_dump_json(indent=1, exclude_none=True)}\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """The results in `path`, empty where there are none. Raises ConfigError for a damaged file."""
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not what this version of the command writes ({str(error).splitlines()[0]}): restore it, or move it away"
            ) from error


def training_metrics(folder: Path) -> dict[str, float]:
    """Figures of a finished run; none where LensNet never learnt."""
    records = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    learnt = [record for record in records if METRICS["lens_loss"] in record]
    last = learnt[-max(1, len(learnt) // LAST_SHARE) :]
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        values = [record[metric] for record in last if record.get(metric) is not None]
        if values:
            found[name] = statistics.fmean(values)
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an evaluation, without the losses of single sequences and without what it does not measure."""
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("losses", "ids") and value is not None
        }
        for record in records
    ]
