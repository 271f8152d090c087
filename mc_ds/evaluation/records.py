"""Results of one policy on one task at one budget, and their means over sequences.

Legend: B sequences, T tokens, W entries, h horizon.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc_ds.focus.view import Plan
from mc_ds.tasks import TaskSample


@dataclass(frozen=True)
class Record:
    """Results of one policy on one task at one budget."""

    task: str
    policy: str
    budget: float
    """The requested share of T; `wc_length` is the resulting number of entries."""
    wc_length: int
    seq_len: int
    horizon_loss: float
    """Loss of the answers in nats per token, mean over sequences."""
    stderr: float | None
    """Standard error of that mean; None for a single sequence."""
    accuracy: float
    """Fraction of the answers' tokens to which the model gives the highest probability."""
    hit_rate: float | None
    """Fraction of the facts needed for the answers that are read completely at LOD0; None if the
    task has no such facts.
    """
    hit_rates_by_hop: list[float] | None
    """The hit rate at each hop: of the facts that the question names, of those that these name, and
    so on; None for tasks with a single hop.
    """
    distractor_rate: float | None
    """Fraction of the facts that the question does not ask for that are read completely at LOD0;
    None if the task has none.
    """
    n: int
    losses: list[float]
    """Loss per sequence, for paired comparisons."""
    ids: list[int]
    """The samples measured. `other_question` skips those without an alternative question."""
    query_tokens: int | None = None
    """Query length of a retrieval policy, in tokens; None for other policies."""
    settings: dict[str, float] = field(default_factory=dict)
    """Settings of the choice of blocks: see `PolicySpec.settings`."""


class Measured(NamedTuple):
    """A model's predictions of the horizons of B sequences, given one policy's contexts."""

    scores: Tensor
    """Horizon loss in nats, [B]."""
    correct: Tensor
    """Whether each target had the highest probability, bool [B, h]."""
    plan: Plan
    """The contexts that were read."""


class Cell:
    """Accumulates the results of one policy at one budget."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.losses: list[float] = []
        self.correct = self.targets = 0.0
        self.hits: list[bool] = []
        self.hops = 1
        self.distractor_hits: list[bool] = []

    def add(
        self,
        measured: Measured,
        rows: Sequence[int],
        samples: Sequence[TaskSample],
        ids: Sequence[int],
        seq_len: int,
    ) -> None:
        """Add the results of the given `rows`. `samples` and `ids` are those of all rows; histories
        have `seq_len` tokens.
        """
        lods, starts = measured.plan.lods, measured.plan.starts
        unread = torch.zeros(len(starts), seq_len, dtype=torch.bool, device=starts.device)
        read = unread.scatter(1, starts, lods == 0).cpu().numpy()
        losses, correct = measured.scores.double().tolist(), measured.correct.cpu().numpy()
        for row in rows:
            sample, is_target = samples[row], samples[row].horizon_mask > 0
            self.ids.append(ids[row])
            self.losses.append(losses[row])
            self.correct += float((correct[row] * is_target).sum())
            self.targets += float(is_target.sum())
            self.hops = sample.hops
            self.hits += [bool(read[row, a:b].all()) for a, b in sample.spans]
            self.distractor_hits += [bool(read[row, a:b].all()) for a, b in sample.distractors]

    def record(self, task: str, policy: str, budget: float, wc_length: int, seq_len: int) -> Record:
        """Return the results over all sequences added so far."""
        losses = np.asarray(self.losses)
        return Record(
            task=task,
            policy=policy,
            budget=budget,
            wc_length=wc_length,
            seq_len=seq_len,
            horizon_loss=float(losses.mean()),
            stderr=float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None,
            accuracy=self.correct / max(1.0, self.targets),
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
