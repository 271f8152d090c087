"""Measures policies on tasks: horizon loss, accuracy and hit rate at exact budgets.

Every policy chooses its working context from the visible history alone; the horizon's loss is then taken with the ordinary forward.

Legend: B sequences per call, T tokens, W entries, h horizon.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mc_ds.evaluation.policies import Case, Policies, sequence_before
from mc_ds.evaluation.views import Focus
from mc_ds.geometry import lod_map, start_counts
from mc_ds.model.megacontext import ModelOutput, NodeTable
from mc_ds.tasks import Task, TaskSample

Forward = Callable[..., ModelOutput | NodeTable]
"""The root module (or the engine around it): tokens alone give the node table, with a plan and a mask the losses."""


@dataclass(frozen=True)
class Record:
    """One policy on one task at one budget."""

    task: str
    policy: str
    budget: float
    """Share of T asked for; the exact length is `wc_length`."""
    wc_length: int
    seq_len: int
    horizon_loss: float
    """Mean over sequences of the answers' loss, in nats per token."""
    stderr: float | None
    """Standard error of that mean; None for a single sequence."""
    accuracy: float
    """Share of the answers' tokens that are the likeliest next token."""
    hit_rate: float | None
    """Share of the spans that matter that are wholly at LOD0; None where the task has none."""
    hit_rates_by_hop: list[float] | None
    """The same of the spans asked for, of those they name, and so on; None where the answers stand in what is asked for."""
    distractor_rate: float | None
    """The same of the spans that were not asked for."""
    n: int
    losses: list[float]
    """Per sequence, for paired comparisons."""
    ids: list[int]
    """Which samples these are: `other_question` has none of those without another question."""


class Evaluator:
    """Runs policies on tasks with one model. Calls `forward` the same number of times for each (task, policy, budget)."""

    def __init__(
        self, forward: Forward, policies: Policies, *, batch_size: int, device: torch.device
    ) -> None:
        self.forward, self.policies, self.batch_size, self.device = (
            forward,
            policies,
            batch_size,
            device,
        )
        self.geometry = policies.geometry

    @torch.no_grad()
    def run(
        self, task: Task, names: Sequence[str], budgets: Sequence[float], ids: Sequence[int]
    ) -> list[Record]:
        """Records of every policy and budget over the samples `ids` of `task`."""
        lengths = {
            budget: self.geometry.reachable_at_most(budget * self.geometry.seq_len)
            for budget in budgets
        }
        cells: dict[tuple[str, float], Cell] = {}
        for start in range(0, len(ids), self.batch_size):
            of_batch = list(ids[start : start + self.batch_size])
            samples = [task.sample(index) for index in of_batch]
            case, tokens, mask = self._case(task, names, of_batch, samples)
            for name in names:
                rows = [
                    row
                    for row, sample in enumerate(samples)
                    if name != "other_question" or sample.other is not None
                ]
                fixed = self.policies.fixed_length(name)
                for budget in budgets if fixed is None else [fixed / self.geometry.seq_len]:
                    plan = self.policies.plan(name, case, fixed or lengths[budget])
                    output = self.forward(tokens, *plan, mask)
                    assert isinstance(output, ModelOutput)
                    if not rows:  # after the forward, which other ranks may be making too
                        continue
                    cell = cells.setdefault((name, budget), Cell())
                    cell.add(
                        output.row_scores[rows],
                        output.horizon_correct[rows],
                        (plan[0][rows], plan[1][rows]),
                        mask[rows],
                        [samples[row] for row in rows],
                        [of_batch[row] for row in rows],
                        self.geometry.seq_len,
                    )
        return [
            cell.record(
                task.name,
                name,
                budget,
                self.policies.fixed_length(name) or lengths[budget],
                self.geometry.seq_len,
            )
            for (name, budget), cell in cells.items()
        ]

    @torch.no_grad()
    def contexts(self, task: Task, names: Sequence[str], budget: float, index: int) -> Focus:
        """Working contexts that the policies choose for sequence `index` of `task`, the same as in a run over it."""
        sample = task.sample(index)
        case, _, _ = self._case(task, names, [index], [sample])
        length = self.geometry.reachable_at_most(budget * self.geometry.seq_len)
        contexts = {}
        for name in names:
            if name != "other_question" or sample.other is not None:
                lods, starts = self.policies.plan(
                    name, case, self.policies.fixed_length(name) or length
                )
                contexts[name] = lods[0].cpu().numpy(), starts[0].cpu().numpy()
        return Focus(
            task.name,
            index,
            self.geometry,
            self.policies.mc.horizon_tokens,
            length,
            contexts,
            sample,
        )

    def _case(
        self, task: Task, names: Sequence[str], ids: list[int], samples: list[TaskSample]
    ) -> tuple[Case, Tensor, Tensor]:
        """The samples `ids` for the policies `names`, with their tokens and masks.

        A row without another question has itself in its place, and is no row of `other_question`.
        """
        tokens = self._tokens(samples)
        mask = torch.from_numpy(np.stack([sample.horizon_mask for sample in samples])).to(
            self.device
        )
        nodes, other_nodes, before = self._nodes(tokens), None, None
        if "other_question" in names:
            other_nodes = self._nodes(self._tokens([sample.other or sample for sample in samples]))
        if "blind" in names:
            before = self._nodes(
                self._tokens([task.sample(sequence_before(index)) for index in ids])
            )
        return (
            Case(nodes, other_nodes, [sample.spans for sample in samples], ids, before),
            tokens,
            mask,
        )

    def _tokens(self, samples: Sequence[TaskSample]) -> Tensor:
        return torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(self.device)

    def _nodes(self, tokens: Tensor) -> NodeTable:
        nodes = self.forward(tokens)
        assert isinstance(nodes, NodeTable)
        return nodes


class Cell:
    """Running results of one (policy, budget)."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.losses: list[float] = []
        self.correct = self.asked = 0.0
        self.hits: list[bool] = []
        self.hops = 1
        self.distractor_hits: list[bool] = []

    def add(
        self,
        row_scores_B: Tensor,
        correct_Bh: Tensor,
        plan: tuple[Tensor, Tensor],
        mask_Bh: Tensor,
        samples: Sequence[TaskSample],
        ids: Sequence[int],
        seq_len: int,
    ) -> None:
        """Adds sequences: losses, which horizon tokens were predicted, and the contexts [B, W] of their first `seq_len` tokens."""
        lods, starts = plan
        self.ids += ids
        self.losses += row_scores_B.double().tolist()
        self.correct += float((correct_Bh * (mask_Bh > 0)).sum())
        self.asked += float((mask_Bh > 0).sum())
        read = (lod_map(lods, start_counts(starts, seq_len)) == 0).cpu().numpy()
        for row, sample in enumerate(samples):
            self.hops = sample.hops
            self.hits += [bool(read[row, a:b].all()) for a, b in sample.spans]
            self.distractor_hits += [bool(read[row, a:b].all()) for a, b in sample.distractors]

    def record(self, task: str, policy: str, budget: float, wc_length: int, seq_len: int) -> Record:
        """The figures of all sequences so far."""
        losses = np.asarray(self.losses)
        return Record(
            task=task,
            policy=policy,
            budget=budget,
            wc_length=wc_length,
            seq_len=seq_len,
            horizon_loss=float(losses.mean()),
            stderr=float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None,
            accuracy=self.correct / max(1.0, self.asked),
            hit_rate=_mean(self.hits),
            hit_rates_by_hop=np.reshape(self.hits, (-1, self.hops)).mean(0).tolist()
            if self.hops > 1
            else None,
            distractor_rate=_mean(self.distractor_hits),
            n=len(losses),
            losses=[float(x) for x in losses],
            ids=self.ids,
        )


def _mean(hits: Iterable[bool]) -> float | None:
    values = list(hits)
    return float(np.mean(values)) if values else None
