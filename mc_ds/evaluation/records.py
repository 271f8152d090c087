"""Figures of an evaluation: what one policy scored on one task at one budget, and how they add up
over sequences.

Legend: B sequences, T tokens, W entries, h horizon.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mc_ds.focus.policies import Plan
from mc_ds.geometry import lod_map, start_counts
from mc_ds.tasks import TaskSample


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
    """The same of the spans asked for, of those they name, and so on; None where the answers stand
    in what is asked for.
    """
    distractor_rate: float | None
    """The same of the spans that were not asked for."""
    n: int
    losses: list[float]
    """Per sequence, for paired comparisons."""
    ids: list[int]
    """Which samples these are: `other_question` has none of those without another question."""


class Measured(NamedTuple):
    """What a model predicts of the horizons of B sequences, read through one policy's contexts."""

    scores: Tensor
    """Horizon loss [B]."""
    correct: Tensor
    """Whether each target was the likeliest token, [B, h]."""
    plan: Plan
    """The contexts."""


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
        measured: Measured,
        rows: Sequence[int],
        samples: Sequence[TaskSample],
        ids: Sequence[int],
        seq_len: int,
    ) -> None:
        """Add the sequences in `rows` of what was measured; `samples`, `ids` are those of all rows,
        of histories of `seq_len` tokens.
        """
        counts = start_counts(measured.plan.starts, seq_len)
        read = (lod_map(measured.plan.lods, counts) == 0).cpu().numpy()
        losses, correct = measured.scores.double().tolist(), measured.correct.cpu().numpy()
        for row in rows:
            sample, asked = samples[row], samples[row].horizon_mask > 0
            self.ids.append(ids[row])
            self.losses.append(losses[row])
            self.correct += float((correct[row] * asked).sum())
            self.asked += float(asked.sum())
            self.hops = sample.hops
            self.hits += [bool(read[row, a:b].all()) for a, b in sample.spans]
            self.distractor_hits += [bool(read[row, a:b].all()) for a, b in sample.distractors]

    def record(self, task: str, policy: str, budget: float, wc_length: int, seq_len: int) -> Record:
        """Return the figures of all sequences so far."""
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
