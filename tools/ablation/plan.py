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
"""Settings of a run that the program itself sets."""


class EvaluationPlan(Settings):
    """Options of one call of `launch/evaluate.py`, which evaluates a trained model on held-out
    sequences.
    """

    task: TaskName = "recall"
    """The task."""
    policies: list[PolicyName] = Field(
        default=["lens", "blind", "other_question", "random", "recency"], min_length=1
    )
    """Context policies, in the order of the table's columns."""
    samples: PositiveInt = 96
    """Number of sequences."""
    batch_size: PositiveInt = 32
    """Sequences per forward pass."""
    seed: NonNegativeInt = 1000
    """Seed of the sequences, which are the same for all variants."""
    iterations: PositiveInt | None = None
    """Setting focus.iterations; empty: the recipe's."""
    memory: bool | None = None
    """Setting focus.memory; empty: the recipe's."""
    history: PositiveFloat = 1.0
    """Length T of the history, as a multiple of that in training."""
    budget: PositiveFloat = 1.0
    """Budget W/T, as a multiple of that in training."""


class Variant(Settings):
    """One row of a table: its differences from the base."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name."""
    steps: PositiveFloat = 1.0
    """Optimizer steps, as a multiple of the base's; warm-ups are scaled too."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Differences of the evaluation. Rows that differ only in these share a training."""


class Base(Settings):
    """The run that the variants of a group modify."""

    recipe: str
    """Recipe of the run."""
    from_weights: bool = False
    """Whether runs need initial weights (`--init_from`); implied if anything is frozen."""
    steps: PositiveInt
    """Optimizer steps. Warm-ups in `settings` refer to this number."""
    last_stage: bool = False
    """Whether the data start at the last stage of the recipe's curriculum."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run by dotted name, which override the recipe."""
    evaluate: EvaluationPlan = EvaluationPlan()
    """Evaluation of all variants."""

    @property
    def needs_weights(self) -> bool:
        """Whether runs of this base need initial weights."""
        return self.from_weights or self.settings.get("train.frozen", "none") != "none"


class Group(Settings):
    """One question and the variants that answer it."""

    question: str
    """The question, as the heading of its table."""
    base: str
    """Name of the base."""
    variants: dict[str, Variant] = Field(min_length=1)
    """Rows of the table by label."""


class Plan(Settings):
    """A plan of ablations: bases and groups by name."""

    bases: dict[str, Base] = Field(min_length=1)
    """Bases by name."""
    groups: dict[str, Group] = Field(min_length=1)
    """Groups by name."""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for name, group in self.groups.items():
            if group.base not in self.bases:
                raise ValueError(
                    f"groups.{name}.base = {group.base!r}: should be one of {', '.join(self.bases)}"
                )
            for label, variant in group.variants.items():
                refuse_fixed(variant.settings, f"groups.{name}.variants.{label}")
        for name, base in self.bases.items():
            refuse_fixed(base.settings, f"bases.{name}")
        return self

    def select(self, only: Collection[str], overrides: Collection[str]) -> dict[str, Group]:
        """Return the groups named in `only`; all if it is empty.

        `overrides` are the settings that the command line sets for all rows. Raises ConfigError for
        an unknown group, or if the program or a row sets the same setting, because then the row's
        label would be wrong.
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
                            f"--{given}: row {name}/{label} sets it too: leave out the option or"
                            " the group"
                        )
        return groups


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML file. Raises ConfigError if it is missing or invalid."""
    if not path.is_file():
        raise ConfigError(f"--plan {path}: no such file; an example is tools/ablations.yaml")
    try:
        return Plan.model_validate(read_recipe(path))
    except ValidationError as error:
        raise validation_error(error, Plan, source=str(path)) from error


def evaluation_of(base: Base, variant: Variant) -> EvaluationPlan:
    """Return the variant's evaluation. Raises ConfigError for unknown fields or invalid values."""
    try:
        return EvaluationPlan.model_validate({**base.evaluate.model_dump(), **variant.evaluate})
    except ValidationError as error:
        raise validation_error(error, EvaluationPlan, source="evaluate") from error


def refuse_fixed(settings: Collection[str], where: str) -> None:
    """Raise ConfigError if `settings` include one of FIXED."""
    fixed = sorted(FIXED.intersection(settings))
    if fixed:
        raise ConfigError(
            f"{where}: {fixed[0]} is set by ablate.py: use --out, --seeds, --init_from, or `steps`"
            " of a variant"
        )
