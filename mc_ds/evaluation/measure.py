"""Measure policies on tasks: horizon loss, accuracy and hit rate at exact budgets.

Every policy chooses its working context from the visible history; an ordinary forward over that
context then gives the horizon's loss. Sequences are read by the root module in batches (`batches`)
or by inference sessions (`sessions`), which choose the same contexts.

Legend: B sequences per call, W entries, h horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mc_ds.config import FocusConfig, MCConfig, RetrievalConfig
from mc_ds.evaluation.records import Cell, Measured, Record
from mc_ds.evaluation.views import Focus, ScoredContext
from mc_ds.focus.policies import Access, PolicySpec, policy
from mc_ds.focus.view import Plan, Round
from mc_ds.tasks import Task, TaskSample

DEFAULT_RETRIEVAL = (RetrievalConfig(),)


@dataclass(frozen=True)
class Samples:
    """Sequences of a task that are read together."""

    ids: list[int]
    samples: list[TaskSample]
    before: list[TaskSample]
    """For each row the sequence whose visible tail the policy `blind` reads (`sequence_before`);
    empty if no policy needs it.
    """

    @classmethod
    def of(cls, task: Task, specs: Sequence[PolicySpec], ids: Sequence[int]) -> "Samples":
        """Return the samples `ids` of a task, and the other sequences that the policies need."""
        blind = any(spec.access is Access.UNRELATED_TAIL for spec in specs)
        before = [task.sample(sequence_before(index)) for index in ids] if blind else []
        return cls(list(ids), [task.sample(index) for index in ids], before)

    def rows(self, spec: PolicySpec) -> list[int]:
        """Return the rows on which the policy is measured: all rows, except that `other_question`
        needs an alternative question.
        """
        return [
            row
            for row, sample in enumerate(self.samples)
            if spec.access is not Access.OTHER_QUESTION or sample.other is not None
        ]


class Reading(Protocol):
    """Sequences prepared for a model. A row without an alternative question or tail is read with
    its own.
    """

    def plan(self, spec: PolicySpec, wc_length: int) -> Plan:
        """Return the contexts that a policy chooses."""
        ...

    def measure(self, spec: PolicySpec, wc_length: int) -> Measured:
        """Return the model's predictions over the contexts that a policy chooses."""
        ...


class Reader(Protocol):
    """A model with a way to read sequences."""

    @property
    def focus(self) -> FocusConfig:
        """Settings of focus."""
        ...

    @property
    def mc(self) -> MCConfig:
        """Settings, with the lengths of the sequences that are read."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of sequences that are read together."""
        ...

    def read(self, samples: Samples, specs: Sequence[PolicySpec]) -> Reading:
        """Prepare the samples for these policies. Raises ConfigError for a policy that this reader
        cannot measure.
        """
        ...


class Evaluator:
    """Measures policies on tasks with one reader. The number of its calls does not depend on the
    samples, so ranks with different samples make the same collectives.
    """

    def __init__(
        self, reader: Reader, retrieval: Sequence[RetrievalConfig] = DEFAULT_RETRIEVAL
    ) -> None:
        """Measure every retrieval policy once with each of the settings `retrieval`."""
        self.reader, self.mc, self.retrieval = reader, reader.mc, retrieval

    @torch.no_grad()
    def run(
        self, task: Task, names: Sequence[str], budgets: Sequence[float], ids: Sequence[int]
    ) -> list[Record]:
        """Measure every policy at every budget (a share of T) over the samples `ids` of `task`;
        return a record for each combination.

        Raises ConfigError for a policy that is unknown or that the reader cannot measure.
        """
        specs, seq_len = specs_of(names, self.retrieval), self.mc.seq_len
        settings: dict[str, dict[str, float]] = {
            spec.name: spec.settings(self.reader.focus, self.mc) for spec in specs
        }
        cells: dict[tuple[str, float, int | None], Cell] = {}
        lengths: dict[tuple[str, float, int | None], int] = {}
        for start in range(0, len(ids), self.reader.batch_size):
            samples = Samples.of(task, specs, ids[start : start + self.reader.batch_size])
            reading = self.reader.read(samples, specs)
            for spec in specs:
                rows = samples.rows(spec)
                bound = spec.fixed_length
                for budget in budgets if bound is None else [bound(self.mc) / seq_len]:
                    key = spec.name, budget, spec.query_tokens
                    lengths[key] = spec.length(budget, self.mc)
                    measured = reading.measure(spec, lengths[key])
                    if rows:  # tested after `measure`, a collective that every rank must call
                        cell = cells.setdefault(key, Cell())
                        cell.add(measured, rows, samples.samples, samples.ids, seq_len)
        return [
            replace(
                cell.record(task.name, name, budget, lengths[name, budget, query], seq_len),
                query_tokens=query,
                settings=settings[name],
            )
            for (name, budget, query), cell in cells.items()
        ]

    @torch.no_grad()
    def contexts(self, task: Task, names: Sequence[str], budget: float, index: int) -> Focus:
        """Return the working contexts that the policies choose for sequence `index` of `task`: the
        same as in `run`, with the first of the retrieval settings.
        """
        specs = [policy(name).using(self.retrieval[0]) for name in names]
        samples = Samples.of(task, specs, [index])
        reading = self.reader.read(samples, specs)
        contexts: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        rounds: dict[str, list[ScoredContext]] = {}
        for spec in specs:
            if samples.rows(spec):
                plan = reading.plan(spec, spec.length(budget, self.mc))
                contexts[spec.name] = plan.lods[0].cpu().numpy(), plan.starts[0].cpu().numpy()
                if plan.rounds:
                    rounds[spec.name] = [self._round(round_) for round_ in plan.rounds]
        geometry = self.mc.geometry
        length = geometry.reachable_at_most(budget * self.mc.seq_len)
        return Focus(
            task.name,
            index,
            geometry,
            self.mc.horizon_tokens,
            length,
            contexts,
            samples.samples[0],
            rounds=rounds,
        )

    def _round(self, round_: Round) -> ScoredContext:
        """Return the first row of a round, with the scores of the entries before the horizon."""
        visible = round_.lods.size(1) - self.mc.horizon_tokens
        return ScoredContext(
            round_.lods[0].cpu().numpy(),
            round_.starts[0].cpu().numpy(),
            round_.scores[0, :visible].float().cpu().numpy(),
        )


def specs_of(names: Sequence[str], retrieval: Sequence[RetrievalConfig]) -> list[PolicySpec]:
    """Return the policies, retrieval policies once for each of the settings. Raises ConfigError for
    an unknown name.
    """
    return [
        spec.using(settings)
        for spec in map(policy, names)
        for settings in (retrieval if spec.retrieval is not None else retrieval[:1])
    ]


def sequence_before(index: int) -> int:
    """Return the sample whose visible tail replaces that of sample `index` for `blind`: the
    previous sample, or sample 1 for sample 0.
    """
    return index - 1 if index else 1
