"""The plan of an ablation: questions, each a group of variants of one base. A YAML file, `tools/ablations.yaml` by default."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mc_ds.config.errors import ConfigError, Settings, nearest, validation_error
from mc_ds.config.recipe import read_recipe
from mc_ds.config.run import PolicyName, TaskName

FIXED = frozenset(
    {
        "config",
        "name",
        "out_dir",
        "seed",
        "train.init_from",
        "train.total_steps",
        "resume",
        "dry_run",
    }
)
"""Settings of a run that the command decides: a plan or a command line that sets them is refused."""
EVALUATED = {"memory": "focus.memory", "iterations": "focus.iterations"}
"""Settings of a run that fields of its evaluation replace."""


class EvaluationPlan(Settings):
    """How a trained model is measured, on fresh sequences: one call of `launch/evaluate.py`."""

    task: TaskName = "recall"
    """What is evaluated."""
    policies: list[PolicyName] = Field(
        default=["lens", "blind", "other_question", "random", "recency"], min_length=1
    )
    """Ways to choose the working context, in the order of the table's columns."""
    samples: PositiveInt = 96
    """Sequences."""
    batch_size: PositiveInt = 32
    """Sequences per forward."""
    seed: NonNegativeInt = 1000
    """Seed of the sequences: the same ones for all variants, none of them trained on."""
    iterations: PositiveInt | None = None
    """Focus iterations; empty: the recipe's."""
    memory: bool | None = None
    """Memory of the focus loop; empty: the recipe's."""
    history: PositiveFloat = 1.0
    """Length of the history, as a multiple of the one trained on."""
    budget: PositiveFloat = 1.0
    """Budget W/T, as a multiple of the one trained on."""


class Variant(Settings):
    """One row of a table: what differs from the base."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name."""
    steps: PositiveFloat = 1.0
    """Steps, as a multiple of the base's; warm-ups follow."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Fields of the base's evaluation that differ. Rows that differ in nothing else share their training."""


class Base(Settings):
    """What the variants of a group are variants of."""

    recipe: str
    """Recipe of the run; `--recipe` replaces it."""
    init_from: str | None = None
    """Weights to start from, a bundle or a run; `--init_from` replaces it."""
    from_weights: bool = False
    """Whether there must be some, even where nothing is frozen."""
    steps: PositiveInt
    """Optimizer steps for which the warm-ups below are meant; `--steps` scales them all."""
    last_stage: bool = False
    """Whether the data stand at the last stage of the recipe's curriculum from the first step on."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name, over the recipe's."""
    evaluate: EvaluationPlan = EvaluationPlan()
    """How its variants are measured."""


class Group(Settings):
    """One question and the variants that answer it."""

    question: str
    """The question, as the heading of its table."""
    base: str
    """Name of the base."""
    variants: dict[str, Variant] = Field(min_length=1)
    """Rows of the table by their label."""


class Plan(Settings):
    """All bases and groups by name."""

    bases: dict[str, Base] = Field(min_length=1)
    """Bases by name."""
    groups: dict[str, Group] = Field(min_length=1)
    """Groups by name, in the order of the page."""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for name, group in self.groups.items():
            if group.base not in self.bases:
                raise ValueError(
                    f"groups.{name}.base = {group.base!r} is not among the bases {', '.join(self.bases)}"
                )
            for label, variant in group.variants.items():
                refuse_fixed(variant.settings, f"groups.{name}.variants.{label}")
                evaluation_of(
                    self.bases[group.base], variant, f"groups.{name}.variants.{label}.evaluate"
                )
        for name, base in self.bases.items():
            refuse_fixed(base.settings, f"bases.{name}")
        return self

    def with_bases(
        self, field: str, values: Mapping[str | None, str], used: Collection[str]
    ) -> "Plan":
        """The plan with `field` of bases replaced: by name, or (name None) of the only one that is `used`.

        Raises ConfigError for an unknown name, and for none where several are used.
        """
        for name, value in values.items():
            if name is not None and name not in self.bases:
                raise ConfigError(
                    f"--{field} {name}={value}: no base of that name, use {', '.join(self.bases)}"
                )
            if name is None and len(used) != 1:
                raise ConfigError(
                    f"--{field} {value}: say of which base ({', '.join(sorted(used))}): --{field} BASE=PATH"
                )
        given = {
            name if name is not None else next(iter(used)): value for name, value in values.items()
        }
        bases = {
            name: base.model_copy(update={field: given[name]}) if name in given else base
            for name, base in self.bases.items()
        }
        return self.model_copy(update={"bases": bases})

    def _names(self) -> list[str]:
        """What `select` knows."""
        return [
            *self.groups,
            *(f"{name}/{label}" for name, group in self.groups.items() for label in group.variants),
        ]

    def split_names(self, text: str) -> list[str]:
        """The names in a comma-separated list. Labels may hold commas: where several parts together are a name, they are that one."""
        known, parts, found = self._names(), text.split(","), []
        while parts:
            several = (
                count
                for count in range(len(parts), 1, -1)
                if ",".join(parts[:count]).strip() in known
            )
            count = next(several, 1)
            found.append(",".join(parts[:count]).strip())
            del parts[:count]
        return [name for name in found if name]

    def select(self, only: Sequence[str]) -> dict[str, list[str]]:
        """Labels of the wanted variants by group, in the plan's order. `only` has groups and `group/variant`s; nothing means all.

        Raises ConfigError for a name that does not exist.
        """
        names = self._names()
        for wanted in only:
            if wanted not in names:
                close = nearest(wanted, names)
                hint = (
                    f"did you mean {close!r}?"
                    if close
                    else f"use {', '.join(self.groups)}, or group/variant"
                )
                raise ConfigError(f"--only {wanted}: the plan has no such group or variant: {hint}")
        chosen = {
            name: [
                label
                for label in group.variants
                if not only or name in only or f"{name}/{label}" in only
            ]
            for name, group in self.groups.items()
        }
        return {name: labels for name, labels in chosen.items() if labels}

    def refuse_decided(self, overrides: Collection[str], groups: Collection[str]) -> None:
        """Raises ConfigError where `overrides` hold a setting that a row of `groups` decides: labels, the default's too, would not hold."""
        for name in groups:
            base = self.bases[self.groups[name].base]
            for label, variant in self.groups[name].variants.items():
                evaluation = evaluation_of(base, variant)
                measured = [
                    setting
                    for field, setting in EVALUATED.items()
                    if getattr(evaluation, field) is not None
                ]
                for setting in (*variant.settings, *measured):
                    for given in overrides:
                        if f"{setting}.".startswith(f"{given}.") or f"{given}.".startswith(
                            f"{setting}."
                        ):
                            raise ConfigError(
                                f"--{given}: rows of group {name} decide {setting} ({label!r}): leave one of the two out"
                            )


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file. Raises ConfigError, in one line."""
    if not Path(path).is_file():
        raise ConfigError(f"--plan {path}: no such file; tools/ablations.yaml is one")
    try:
        return Plan.model_validate(read_recipe(path))
    except ValidationError as error:
        raise validation_error(error, Plan, source=str(path)) from error


def evaluation_of(base: Base, variant: Variant, where: str = "") -> EvaluationPlan:
    """The variant's evaluation. Raises ConfigError naming `where` for fields that do not exist or cannot be."""
    try:
        return EvaluationPlan.model_validate({**base.evaluate.model_dump(), **variant.evaluate})
    except ValidationError as error:
        raise ConfigError(f"{where}: {validation_error(error, EvaluationPlan)}") from error


def refuse_fixed(settings: Collection[str], where: str) -> None:
    """Raises ConfigError where `settings` hold one that the command decides."""
    fixed = sorted(FIXED.intersection(settings))
    if fixed:
        options = "--out, --seeds, --steps, --recipe, --init_from, and `steps` of a variant"
        raise ConfigError(f"{where}: {fixed[0]} is decided by the command: use its {options}")
