"""From a plan to trials: which trainings and evaluations its rows need, each once however many rows share it.

A trial is one training and the evaluations of what it trained. Its key is a fingerprint of all that decides its figures, so that a finished
one is never run again, and one whose settings changed always is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablation.plan import Base, EvaluationPlan, Plan, Variant, evaluation_of, refuse_fixed
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.cli import load_config
from mc_ds.data.tokenizer import KINDS

WARM_UPS = ("train.warmup_steps", "mc.lens_warmup_steps")
"""Settings in steps that follow the number of steps."""


@dataclass(frozen=True)
class Evaluation:
    """One call of `launch/evaluate.py`."""

    options: tuple[str, ...]
    """Its options, without the checkpoint and the output."""
    task: str
    seq_len: int
    policies: tuple[str, ...]

    @property
    def key(self) -> str:
        """Fingerprint of what it measures."""
        return _digest([self.options])


@dataclass
class Trial:
    """One training, and the evaluations that rows want of it."""

    name: str
    """Name of its folder."""
    key: str
    config: RunConfig
    recipe: str
    """What its config was made from."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """By key."""


@dataclass(frozen=True)
class Row:
    """One row of a group's table."""

    label: str
    trials: dict[int, str]
    """Key of the trial by seed."""
    evaluation: str
    """Key of the evaluation."""
    wanted: bool
    """Whether this call is to run it."""


@dataclass(frozen=True)
class Grid:
    """Rows by group, and the trials behind them by key."""

    rows: dict[str, list[Row]]
    trials: dict[str, Trial]

    def wanted(self) -> list[Trial]:
        """Trials of the wanted rows, each with the evaluations that those rows want, the longest trainings first."""
        chosen: dict[str, Trial] = {}
        for row in (row for rows in self.rows.values() for row in rows if row.wanted):
            for key in row.trials.values():
                whole = self.trials[key]
                trial = chosen.setdefault(key, replace(whole, evaluations={}))
                trial.evaluations[row.evaluation] = whole.evaluations[row.evaluation]
        return sorted(chosen.values(), key=lambda trial: -trial.config.train.total_steps)


def make_grid(
    plan: Plan,
    selected: Mapping[str, Sequence[str]],
    *,
    seeds: Sequence[int],
    out: Path,
    steps: int | None = None,
    samples: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Grid:
    """All rows of the groups in `selected`, of which the labels it lists are wanted.

    `steps` replaces the bases' and scales warm-ups, `samples` the evaluations' sequences; `overrides` are settings of every training.
    Raises ConfigError, naming the variant, for settings that cannot work, and for overrides of what rows decide.
    """
    refuse_fixed(overrides or {}, "command line")
    plan.refuse_decided(overrides or {}, selected)
    trials: dict[str, Trial] = {}
    rows: dict[str, list[Row]] = {}
    for group, labels in selected.items():
        name_of_base = plan.groups[group].base
        base = plan.bases[name_of_base]
        weights = _weights(base, name_of_base)
        rows[group] = []
        for label, variant in plan.groups[group].variants.items():
            where = f"{group}/{label}"
            of_seed: dict[int, str] = {}
            for seed in seeds:
                config = trial_config(
                    base,
                    variant,
                    where,
                    weights=weights,
                    seed=seed,
                    steps=steps,
                    overrides=overrides or {},
                )
                wanted = evaluation_of(base, variant, where)
                evaluation = make_evaluation(
                    wanted if samples is None else wanted.model_copy(update={"samples": samples}),
                    config,
                )
                key = fingerprint(config)
                name = f"{_slug(group)}-{_slug(label)}-s{seed}-{key[:8]}"
                trial = trials.setdefault(
                    key, Trial(name, key, _placed(config, name, out), base.recipe)
                )
                trial.evaluations[evaluation.key] = evaluation
                of_seed[seed] = key
            rows[group].append(Row(label, of_seed, evaluation.key, label in labels))
    return Grid(rows, trials)


def trial_config(
    base: Base,
    variant: Variant,
    where: str,
    *,
    seed: int,
    overrides: Mapping[str, Any],
    weights: Mapping[str, Any],
    steps: int | None = None,
) -> RunConfig:
    """The run of a variant. Precedence, lowest first: recipe, base, weights, variant, number of steps, `overrides`.

    Raises ConfigError naming `where` for settings that cannot work.
    """
    settings = {**base.settings, **weights, **variant.settings, "seed": seed}
    try:
        meant = _load(base.recipe, {**settings, "train.total_steps": base.steps, **overrides})
        if base.last_stage:
            settings["data.recall.facts_by_stage"] = meant.data.recall.facts_by_stage[-1:]
        total = max(1, round((steps or base.steps) * variant.steps))
        if total != base.steps:
            scale = total / base.steps
            warm_ups = {
                name: round(scale * value)
                for name, value in zip(
                    WARM_UPS, (meant.train.warmup_steps, meant.mc.lens_warmup_steps), strict=True
                )
            }
            settings |= warm_ups
        return _load(base.recipe, {**settings, "train.total_steps": total, **overrides})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def make_evaluation(plan: EvaluationPlan, config: RunConfig) -> Evaluation:
    """The evaluation of a run, its lengths resolved."""
    seq_len = round(config.mc.seq_len * plan.history)
    budget = min(1.0, config.mc.train_wc_length / config.mc.seq_len * plan.budget)
    options = {
        "tasks": plan.task,
        "policies": ",".join(plan.policies),
        "budgets": repr(budget),
        "seq_lens": seq_len,
        "seed": plan.seed,
        "samples": plan.samples,
        "batch_size": plan.batch_size,
    }
    if plan.iterations is not None:
        options["iterations"] = plan.iterations
    if plan.memory is not None:
        options["memory"] = "on" if plan.memory else "off"
    pairs = tuple(part for name, value in options.items() for part in (f"--{name}", str(value)))
    return Evaluation(pairs, plan.task, seq_len, tuple(plan.policies))


def fingerprint(config: RunConfig) -> str:
    """SHA-256 of what decides a run's figures: its settings, without those of place and reporting, and the weights it starts from."""
    settings = config.model_dump(
        mode="json", exclude={"name", "out_dir", "resume", "dry_run", "telemetry"}
    )
    del settings["data"]["cache_dir"], settings["data"]["num_workers"]
    start = config.train.init_from
    if start is not None:
        settings["train"]["init_from"] = _weights_identity(Path(start))
        if settings["data"]["tokenizer"] == start:
            settings["data"]["tokenizer"] = "that of the weights"
    return _digest(settings)


def _weights_identity(start: Path) -> list[Any]:
    """What tells weights apart: a bundle's manifest, which hashes them, or the names, sizes and times of a run's files."""
    manifest = start / "manifest.json"
    if manifest.is_file():
        return [hashlib.sha256(manifest.read_bytes()).hexdigest()]
    files = sorted(
        path
        for path in start.rglob("*")
        if path.is_file() and path.suffix in (".pt", ".json", ".safetensors")
    )
    return [
        [str(path.relative_to(start)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]


def _weights(base: Base, name: str) -> dict[str, Any]:
    """Settings that start runs of base `name` from its weights, with their tokenizer. Raises ConfigError where it lacks what it needs."""
    if base.init_from is None:
        if base.from_weights or base.settings.get("train.frozen", "none") != "none":
            raise ConfigError(
                f"base {name} starts from trained weights: give --init_from {name}=PATH, a bundle or a run's folder"
            )
        return {}
    folder = Path(base.init_from)
    if not folder.is_dir():
        raise ConfigError(
            f"base {name}: init_from = {base.init_from}: no such folder; give a bundle or a run's folder"
        )
    settings: dict[str, Any] = {"train.init_from": base.init_from}
    if any((folder / kind.file_name).is_file() for kind in KINDS):
        settings["data.tokenizer"] = base.init_from
    return settings


def _load(recipe: str, settings: Mapping[str, Any]) -> RunConfig:
    """The recipe with `settings` over it, by the code of the training command line."""
    options = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
    return load_config([f"--config={recipe}", *options])


def _placed(config: RunConfig, name: str, out: Path) -> RunConfig:
    """The run in its own folder below `out`, started over whenever it is run, reporting to its record alone."""
    quiet = config.telemetry.model_copy(update={"wandb": False, "progress": False})
    return config.model_copy(
        update={"name": name, "out_dir": str(out / "runs"), "resume": "never", "telemetry": quiet}
    )


def _slug(text: str) -> str:
    """Text as part of a folder's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text.lower()).strip("_")[:24]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
