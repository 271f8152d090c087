"""Makes the rows of a plan's tables, with the training and evaluation that each row and seed needs.

A trial is one training, which several rows may share. Its folder's name has a fingerprint of
everything that determines its results, so that finished trials are recognised, and trials with
other settings use another folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.plan import Base, EvaluationPlan, Group, Plan, Variant, evaluation_of
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.cli import load_config
from mc_ds.data.tokenizer import KINDS

WARM_UPS = ("train.warmup_steps", "mc.lens_warmup_steps")
"""Warm-ups, in steps, that are scaled with the total number of steps."""


@dataclass
class Trial:
    """One training with its evaluations."""

    config: RunConfig
    recipe: str
    """Path of the recipe."""
    evaluations: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    """For each evaluation, by the file of its records: options of `launch/evaluate.py`, without
    checkpoint and output.
    """

    @property
    def folder(self) -> Path:
        """Folder of the run and its results."""
        return Path(self.config.out_dir) / self.config.name

    @property
    def trained(self) -> Path:
        """File that exists if the training has finished."""
        return self.folder / "trained.json"

    @property
    def missing(self) -> list[Path]:
        """Record files of evaluations that are not finished."""
        return [path for path in self.evaluations if not path.exists()]


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: str
    runs: list[tuple[Trial, Path]]
    """For each seed: the trial, and the record file of the evaluation."""


def make_rows(
    plan: Plan,
    groups: Mapping[str, Group],
    *,
    seeds: Sequence[int],
    out: Path,
    weights: Mapping[str, str],
    overrides: Mapping[str, str],
) -> dict[str, list[Row]]:
    """Return the rows of each group.

    `weights` maps bases to initial weights; `overrides` are settings of every training. Raises
    ConfigError, naming the row, for invalid settings.
    """
    for name in weights:
        if name not in plan.bases:
            raise ConfigError(
                f"--init_from {name}=...: there is no such base: use one of {', '.join(plan.bases)}"
            )
    trials: dict[str, Trial] = {}
    rows: dict[str, list[Row]] = {}
    for name, group in groups.items():
        base = plan.bases[group.base]
        start = _start(base, group.base, weights.get(group.base))
        rows[name] = []
        for label, variant in group.variants.items():
            runs = []
            for seed in seeds:
                try:
                    config = trial_config(base, variant, {**start, "seed": seed}, overrides)
                    options = evaluation_options(evaluation_of(base, variant), config)
                except ConfigError as error:
                    raise ConfigError(f"{name}/{label}: {error}") from error
                key = f"{group.base}-{fingerprint(config)}"
                trial = trials.setdefault(key, Trial(_placed(config, key, out), base.recipe))
                records = trial.folder / f"evaluation-{_digest(options)}.json"
                trial.evaluations[records] = options
                runs.append((trial, records))
            rows[name].append(Row(label, runs))
    return rows


def trial_config(
    base: Base, variant: Variant, start: Mapping[str, Any], overrides: Mapping[str, str]
) -> RunConfig:
    """Return the config of a variant.

    Precedence, lowest first: recipe, base, `start`, variant, number of steps, `overrides`.
    """
    settings = {**base.settings, **start, **variant.settings}
    unscaled = _load(base.recipe, {**settings, "train.total_steps": base.steps, **overrides})
    if base.last_stage:
        settings["data.recall.facts_by_stage"] = unscaled.data.recall.facts_by_stage[-1:]
    total = max(1, round(base.steps * variant.steps))
    if total != base.steps:
        warm_ups = (unscaled.train.warmup_steps, unscaled.mc.lens_warmup_steps)
        for name, steps in zip(WARM_UPS, warm_ups, strict=True):
            settings[name] = round(steps * total / base.steps)
    return _load(base.recipe, {**settings, "train.total_steps": total, **overrides})


def evaluation_options(plan: EvaluationPlan, config: RunConfig) -> tuple[str, ...]:
    """Return the options of `launch/evaluate.py` for an evaluation of a run."""
    options = {
        "tasks": plan.task,
        "policies": ",".join(plan.policies),
        "budgets": min(1.0, config.mc.train_wc_length / config.mc.seq_len * plan.budget),
        "seq_lens": round(config.mc.seq_len * plan.history),
        "seed": plan.seed,
        "samples": plan.samples,
        "batch_size": plan.batch_size,
    }
    if plan.iterations is not None:
        options["iterations"] = plan.iterations
    if plan.memory is not None:
        options["memory"] = "on" if plan.memory else "off"
    return tuple(part for name, value in options.items() for part in (f"--{name}", str(value)))


def fingerprint(config: RunConfig) -> str:
    """Return a digest of everything that determines a run's results: its settings, except paths and
    reporting, and its initial weights.
    """
    settings = config.model_dump(
        mode="json", exclude={"name", "out_dir", "resume", "dry_run", "telemetry"}
    )
    del settings["data"]["cache_dir"], settings["data"]["num_workers"]
    start = config.train.init_from
    return _digest([settings, None if start is None else _weights_identity(Path(start))])


def _weights_identity(start: Path) -> Any:
    """Return a value that identifies weights: a bundle's manifest, which has hashes, or the names,
    sizes and times of a run's files.
    """
    manifest = start / "manifest.json"
    if manifest.is_file():
        return manifest.read_text()
    files = (path for path in sorted(start.rglob("*")) if path.is_file())
    return [
        [str(path.relative_to(start)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if path.suffix in (".pt", ".json", ".safetensors")
    ]


def _start(base: Base, name: str, weights: str | None) -> dict[str, Any]:
    """Return the settings of `train.init_from` and `data.tokenizer` for runs of base `name`.

    Raises ConfigError if the base needs weights and none are given.
    """
    if weights is None:
        if base.needs_weights:
            raise ConfigError(
                f"base {name} needs initial weights: give --init_from {name}=PATH, a bundle or a"
                " run's folder"
            )
        return {}
    folder = Path(weights)
    if not folder.is_dir():
        raise ConfigError(
            f"--init_from {name}={weights}: no such folder; give a bundle or a run's folder"
        )
    has_tokenizer = any((folder / kind.file_name).is_file() for kind in KINDS)
    return {"train.init_from": weights} | ({"data.tokenizer": weights} if has_tokenizer else {})


def _load(recipe: str, settings: Mapping[str, Any]) -> RunConfig:
    """Load a recipe with `settings` as command-line options."""
    options = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
    return load_config([f"--config={recipe}", *options])


def _placed(config: RunConfig, name: str, out: Path) -> RunConfig:
    """Return the config with the run's folder below `out`, `resume: never`, and no reporting except
    metrics.jsonl.
    """
    quiet = config.telemetry.model_copy(update={"wandb": False, "progress": False})
    return config.model_copy(
        update={"name": name, "out_dir": str(out), "resume": "never", "telemetry": quiet}
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
