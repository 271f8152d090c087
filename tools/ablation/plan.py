"""The plan of an ablation, a YAML file (`tools/ablations.yaml` by default): questions, each
answered by variants of a base.
"""

from collections.abc import Collection
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

from mc_ds.config.data import TaskName
from mc_ds.config.errors import ConfigError, Settings, suggestion, validation_error
from mc_ds.config.recipe import read_recipe
from mc_ds.config.run import PolicyName

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
"""Settings of a run that the command itself sets."""


class EvaluationPlan(Settings):
    """How a trained model is evaluated, on sequences it was not trained on: one call of
    `launch/evaluate.py`.
    """

    task: TaskName = "recall"
    """The task."""
    policies: list[PolicyName] = Field(
        default=["lens", "blind", "other_question", "random", "recency"], min_length=1
    )
    """Ways to choose the working context, in the order of the table's columns."""
    samples: PositiveInt = 96
    """Sequences."""
    batch_size: PositiveInt = 32
    """Sequences per forward."""
    seed: NonNegativeInt = 1000
    """Seed of the sequences, which are the same for all variants and not trained on."""
    iterations: PositiveInt | None = None
    """Focus iterations; empty: the recipe's."""
    memory: bool | None = None
    """Memory of the focus loop; empty: the recipe's."""
    history: PositiveFloat = 1.0
    """Length of the history, as a multiple of that in training."""
    budget: PositiveFloat = 1.0
    """Budget W/T, as a multiple of that in training."""


class Variant(Settings):
    """One row of a table: its differences from the base."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name."""
    steps: PositiveFloat = 1.0
    """Steps, as a multiple of the base's; warm-ups follow."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Fields of the evaluation that differ from the base's. Rows that differ only in these share a
    training.
    """


class Base(Settings):
    """The run that the variants of a group modify."""

    recipe: str
    """Recipe of the run."""
    from_weights: bool = False
    """Whether it starts from trained weights (`--init_from`); always where something is frozen."""
    steps: PositiveInt
    """Optimizer steps for which the warm-ups below are meant."""
    last_stage: bool = False
    """Whether the data start at the last stage of the recipe's curriculum."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name, over the recipe's."""
    evaluate: EvaluationPlan = EvaluationPlan()
    """How its variants are measured."""

    @property
    def needs_weights(self) -> bool:
        """Whether it needs trained weights to start."""
        return self.from_weights or self.settings.get("train.frozen", "none") != "none"


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
    """Groups by name."""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for name, group in self.groups.items():
            if group.base not in self.bases:
                raise ValueError(
                    f"groups.{name}.base = {group.base!r} is not among the bases"
                    f" {', '.join(self.bases)}"
                )
            for label, variant in group.variants.items():
                refuse_fixed(variant.settings, f"groups.{name}.variants.{label}")
        for name, base in self.bases.items():
            refuse_fixed(base.settings, f"bases.{name}")
        return self

    def select(self, only: Collection[str], overrides: Collection[str]) -> dict[str, Group]:
        """Return the groups in `only`, all where it is empty. `overrides` are settings for all of
        their rows. Raises ConfigError for an unknown group, and for a setting that the command or a
        row sets: the labels of rows would be wrong.
        """
        for name in only:
            if name not in self.groups:
                hint = suggestion(name, self.groups) or f"use {', '.join(self.groups)}"
                raise ConfigError(f"--only {name}: the plan has no such group: {hint}")
        refuse_fixed(overrides, "command line")
        groups = {name: group for name, group in self.groups.items() if not only or name in only}
        for name, group in groups.items():
            for label, variant in group.variants.items():
                for given in overrides:
                    if any(f"{setting}.".startswith(f"{given}.") for setting in variant.settings):
                        raise ConfigError(
                            f"--{given}: row {name}/{label} decides it: leave one of the two out"
                        )
        return groups


def read_plan(path: Path) -> Plan:
    """Read the plan in a YAML file. Raises ConfigError, in one line, where it is missing or
    invalid.
    """
    if not path.is_file():
        raise ConfigError(f"--plan {path}: no such file; tools/ablations.yaml is one")
    try:
        return Plan.model_validate(read_recipe(path))
    except ValidationError as error:
        raise validation_error(error, Plan, source=str(path)) from error


def evaluation_of(base: Base, variant: Variant) -> EvaluationPlan:
    """Return the variant's evaluation. Raises ConfigError for unknown fields and bad values."""
    try:
        return EvaluationPlan.model_validate({**base.evaluate.model_dump(), **variant.evaluate})
    except ValidationError as error:
        raise validation_error(error, EvaluationPlan, source="evaluate") from error


def refuse_fixed(settings: Collection[str], where: str) -> None:
    """Raise ConfigError where `settings` have one that the command itself sets."""
    fixed = sorted(FIXED.intersection(settings))
    if fixed:
        raise ConfigError(
            f"{where}: {fixed[0]} is decided by the command: use --out, --seeds, --init_from, and"
            " `steps` of a variant"
        )
