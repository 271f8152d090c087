"""Measures policies on tasks: horizon loss, accuracy and hit rate at exact budgets.

Every policy chooses its working context from the visible history alone; the horizon's loss is then taken with the ordinary forward.

Legend: B sequences per call, T tokens, W entries, h horizon.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.drawing import LEGEND, lod_ascii, span_marks
from mc_ds.evaluation.policies import Case, Policies
from mc_ds.evaluation.tasks import Task, TaskSample
from mc_ds.geometry import lod_map, start_counts
from mc_ds.model import ModelOutput, NodeTable

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
    stderr: float
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


class Evaluator:
    """Runs policies on tasks with one model. Calls `forward` the same number of times for each (task, policy, budget)."""

    def __init__(self, forward: Forward, policies: Policies, *, batch_size: int, device: torch.device) -> None:
        self.forward, self.policies, self.batch_size, self.device = forward, policies, batch_size, device
        self.geometry = policies.geometry

    @torch.no_grad()
    def run(self, task: Task, names: Sequence[str], budgets: Sequence[float], ids: Sequence[int]) -> list[Record]:
        """Records of every policy and budget over the samples `ids` of `task`."""
        lengths = {budget: self.geometry.reachable_at_most(budget * self.geometry.seq_len) for budget in budgets}
        cells: dict[tuple[str, float], Cell] = {}
        for start in range(0, len(ids), self.batch_size):
            of_batch = list(ids[start : start + self.batch_size])
            samples = [task.sample(index) for index in of_batch]
            case, tokens, mask = self._case(of_batch, samples)
            for name in names:
                if name == "other_question" and case.other_nodes is None:
                    continue
                fixed = self.policies.fixed_length(name)
                for budget in budgets if fixed is None else [fixed / self.geometry.seq_len]:
                    plan = self.policies.plan(name, case, fixed or lengths[budget])
                    output = self.forward(tokens, *plan, mask)
                    assert isinstance(output, ModelOutput)
                    cell = cells.setdefault((name, budget), Cell())
                    cell.add(output.row_scores, output.horizon_correct, plan, mask, samples, self.geometry.seq_len)
        return [
            cell.record(task.name, name, budget, self.policies.fixed_length(name) or lengths[budget], self.geometry.seq_len)
            for (name, budget), cell in cells.items()
        ]

    @torch.no_grad()
    def draw(self, task: Task, names: Sequence[str], budget: float, index: int) -> list[str]:
        """Working contexts that the policies choose for sequence `index` of `task`, a line each, with its spans marked below."""
        ids = [index, index + 1]  # the blind control needs another sequence
        samples = [task.sample(i) for i in ids]
        case, _, _ = self._case(ids, samples)
        length = self.geometry.reachable_at_most(budget * self.geometry.seq_len)
        rows = {}
        for name in names:
            if name != "other_question" or case.other_nodes is not None:
                lods, starts = self.policies.plan(name, case, self.policies.fixed_length(name) or length)
                rows[name] = lods[0].cpu().numpy(), starts[0].cpu().numpy()
        title = f"{task.name}, sequence {index}, {length} entries for {self.geometry.seq_len} tokens"
        return focus_lines(title, rows, samples[0], self.geometry.block_size, self.geometry.seq_len)

    def _case(self, ids: list[int], samples: list[TaskSample]) -> tuple[Case, Tensor, Tensor]:
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(self.device)
        mask = torch.from_numpy(np.stack([sample.horizon_mask for sample in samples])).to(self.device)
        others = [sample.other.tokens for sample in samples if sample.other is not None]
        nodes = self.forward(tokens)
        other_nodes = self.forward(torch.from_numpy(np.stack(others)).to(self.device)) if len(others) == len(samples) else None
        assert isinstance(nodes, NodeTable)
        assert other_nodes is None or isinstance(other_nodes, NodeTable)
        return Case(nodes, other_nodes, [sample.spans for sample in samples], ids), tokens, mask


class Cell:
    """Running results of one (policy, budget)."""

    def __init__(self) -> None:
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
        seq_len: int,
    ) -> None:
        """Adds sequences: their losses, which horizon tokens were predicted, and the contexts [B, W] of their first `seq_len` tokens."""
        lods, starts = plan
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
            stderr=float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else 0.0,
            accuracy=self.correct / max(1.0, self.asked),
            hit_rate=_mean(self.hits),
            hit_rates_by_hop=np.reshape(self.hits, (-1, self.hops)).mean(0).tolist() if self.hops > 1 else None,
            distractor_rate=_mean(self.distractor_hits),
            n=len(losses),
            losses=[float(x) for x in losses],
        )


def focus_lines(
    title: str,
    rows: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    sample: TaskSample,
    block_size: int,
    seq_len: int,
    decode: Callable[[NDArray[np.int64]], str] | None = None,
) -> list[str]:
    """Contexts (`lods`, `starts` [W]) by name, a line each, with the spans of the sample marked below.

    `decode` adds what the spans that were asked for say.
    """
    lines = [title, LEGEND]
    lines += [f"{name:>15} |{lod_ascii(lods, starts, block_size, seq_len)}|" for name, (lods, starts) in rows.items()]
    for label, spans, mark in (("asked", sample.spans, "^"), ("not asked", sample.distractors, "'")):
        if len(spans):
            lines.append(f"{label:>15}  {span_marks(spans, block_size, seq_len, mark)}")
    if decode is not None and len(sample.spans):
        texts = ", ".join(decode(sample.tokens[first:last]).strip() for first, last in sample.spans)
        lines.append(f"{'asked for':>15}  {texts}")
    return lines


def _mean(hits: Iterable[bool]) -> float | None:
    values = list(hits)
    return float(np.mean(values)) if values else None
