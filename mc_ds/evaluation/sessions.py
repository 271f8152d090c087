"""Measures policies on tasks with inference sessions: the same figures as `measure`, by the code that serves.

A sample's history is ingested once into a tree in memory; every policy and budget reads it through a session of its own, which is asked for
the loss of the horizon.

Legend: T tokens, W entries, h horizon.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.config.run import PolicyName
from mc_ds.evaluation.measure import Cell, Record
from mc_ds.evaluation.policies import sequence_before
from mc_ds.evaluation.views import Focus
from mc_ds.inference import InferenceModel, MegaContextTree, Session
from mc_ds.tasks import Task, TaskSample

SESSION_POLICIES: tuple[PolicyName, ...] = (
    "recency",
    "random",
    "uniform",
    "lens",
    "blind",
    "other_question",
    "full",
    "tail",
)
"""What sessions can do: all but the oracle, which knows the answers."""


class SessionEvaluator:
    """Runs policies on tasks of the lengths of `mc`, with sessions of `model`.

    `blind` reads the tail of another of the samples, `other_question` that of the same history under its other question; `full` and `tail`
    are recency at lengths that no budget changes. `search` is that of `InferenceModel.session`.
    """

    def __init__(
        self,
        model: InferenceModel,
        mc: MCConfig,
        *,
        focus: FocusConfig | None = None,
        seed: int = 0,
        search: bool | int | None = None,
    ) -> None:
        self.model, self.geometry, self.horizon = model, mc.geometry, mc.horizon_tokens
        self.focus, self.seed, self.search = focus, seed, search
        self.fixed = {"full": mc.seq_len, "tail": mc.recent_tokens}

    def run(
        self, task: Task, names: Sequence[str], budgets: Sequence[float], ids: Sequence[int]
    ) -> list[Record]:
        """Records of every policy and budget (shares of T) over the samples `ids`. Raises ConfigError for what sessions cannot do."""
        for name in names:
            self._check(name)
        cells: dict[tuple[str, float], Cell] = {}
        seq_len = self.geometry.seq_len
        for index in ids:
            sample, before = task.sample(index), self._before(task, names, index)
            with self._tree(sample) as tree:
                for name in names:
                    fixed = self.fixed.get(name)
                    for budget in budgets if fixed is None else [fixed / seq_len]:
                        session = self._session(name, budget, tree, index, sample, before)
                        if session is not None:
                            self._add(
                                cells.setdefault((name, budget), Cell()), session, sample, index
                            )
        return [
            cell.record(task.name, name, budget, self._length(name, budget), seq_len)
            for (name, budget), cell in cells.items()
        ]

    def contexts(self, task: Task, names: Sequence[str], budget: float, index: int) -> Focus:
        """Working contexts that the policies choose for sample `index`, the same as in a run over it.

        The sample's spans are decoded where the model has a tokenizer.
        """
        sample, before = task.sample(index), self._before(task, names, index)
        contexts = {}
        with self._tree(sample) as tree:
            for name in names:
                self._check(name)
                session = self._session(name, budget, tree, index, sample, before)
                if session is not None:
                    contexts[name] = session.working_context()
        focus = Focus(
            task.name,
            index,
            self.geometry,
            self.horizon,
            self._length("lens", budget),
            contexts,
            sample,
        )
        return (
            focus if self.model.tokenizer is None else focus.with_texts(self.model.tokenizer.decode)
        )

    @staticmethod
    def _before(task: Task, names: Sequence[str], index: int) -> TaskSample | None:
        """The sample whose tail `blind` reads; None where it is not asked for."""
        return task.sample(sequence_before(index)) if "blind" in names else None

    @property
    def _known(self) -> int:
        """Tokens of the history: all up to the first target of the horizon."""
        return self.geometry.seq_len - self.horizon + 1

    def _tree(self, sample: TaskSample) -> MegaContextTree:
        tree = self.model.open_tree("ram")
        tree.append(sample.tokens[: self._known])
        return tree

    def _length(self, name: str, budget: float) -> int:
        return self.fixed.get(name) or self.geometry.reachable_at_most(
            budget * self.geometry.seq_len
        )

    def _session(
        self,
        name: str,
        budget: float,
        tree: MegaContextTree,
        index: int,
        sample: TaskSample,
        before: TaskSample | None,
    ) -> Session | None:
        """A session over the sample's history; None where the task has no other question."""
        policy, tail = name, None
        match name:
            case "full" | "tail":
                policy = "recency"
            case "blind":
                assert before is not None
                tail = self._visible(before.tokens)
            case "other_question":
                if sample.other is None:
                    return None
                policy, tail = "lens", self._visible(sample.other.tokens)
        return self.model.session(
            policy,
            self._length(name, budget),
            tree,
            seed=(self.seed, index),
            search=self.search,
            tail=tail,
            focus=self.focus,
        )

    def _visible(self, tokens: NDArray[np.int64]) -> list[int]:
        """What of a sequence LensNet may see."""
        return [int(token) for token in tokens[: self._known - 1]]

    def _add(self, cell: Cell, session: Session, sample: TaskSample, index: int) -> None:
        losses = session.losses(sample.tokens[self._known :])
        mask = torch.from_numpy(sample.horizon_mask).to(losses.nll.device)
        score = (losses.nll * mask).sum() / mask.sum().clamp_min(1e-9)
        plan = [torch.from_numpy(part)[None] for part in session.working_context()]
        cell.add(
            score[None],
            losses.correct[None],
            (plan[0], plan[1]),
            mask[None],
            [sample],
            [index],
            self._known,
        )

    def _check(self, name: str) -> None:
        if name == "oracle":
            raise ConfigError(
                "policy = 'oracle' knows which spans matter, a session does not: evaluate it with --checkpoint"
            )
        if name not in SESSION_POLICIES:
            raise ConfigError(f"policy = {name!r} is unknown: use {', '.join(SESSION_POLICIES)}")
