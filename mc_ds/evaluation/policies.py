"""Policies: ways to choose a working context of exactly W entries, all before any horizon token is visible.

Baselines of today (`recency`), of chance (`random`, `uniform`), LensNet (`lens`) with its controls (`blind`: the visible tail is another
sequence's; `other_question`: the focus was chosen under another question), and the bounds (`oracle`: the spans that matter first;
`full`: the whole sequence at LOD0; `tail`: the protected tail alone). Source: docs/inference.md, "Focus".

Legend: B sequences (one row each), T tokens, W entries, n_1 head blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.config.run import PolicyName
from mc_ds.focus import FocusAllocator, Scorer, even_blocks, plan_of_blocks, uniform_blocks
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry, node_index
from mc_ds.model.megacontext import NodeTable, gather_entries
from mc_ds.variants import TrainingWCVariationAllocator

Plan = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of sequences as policies see it: trees and spans, no horizon loss."""

    nodes: NodeTable
    """Node tables of the B sequences."""
    other_nodes: NodeTable | None
    """The same histories under another question; None where that is not asked for."""
    spans: list[NDArray[np.int64]]
    """Per sequence, token ranges [n, 2] that matter (for `oracle` only)."""
    ids: list[int]
    """Sample indices, for deterministic draws."""
    before: NodeTable | None = None
    """The sequences whose visible tails `blind` reads (`sequence_before`), row by row; None where it is not asked for."""


def sequence_before(index: int) -> int:
    """The sample whose visible tail stands in for that of sample `index` under `blind`: the one before it, for the first the second."""
    return index - 1 if index else 1


class Policies:
    """All policies over one model's LensNet and geometry. Must be used inside `controller.inference()`."""

    NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

    def __init__(
        self,
        mc: MCConfig,
        controller: MCController,
        focus: FocusConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.mc, self.geometry, self.controller, self.focus, self.seed, self.device = (
            mc,
            mc.geometry,
            controller,
            focus,
            seed,
            device,
        )

    def plan(self, name: str, case: Case, wc_length: int) -> Plan:
        """`lods` and `starts` [B, W] of policy `name`. Raises ValueError for an unknown name or a task that lacks what it needs."""
        choices: dict[str, Callable[[Case, int], Plan]] = {
            "recency": self._recency,
            "random": self._random,
            "uniform": self._uniform,
            "lens": lambda case, length: self._focused(
                case, length, lens_scorer(self.controller, case.nodes, self.mc)
            ),
            "blind": self._blind,
            "other_question": self._other_question,
            "oracle": self._oracle,
            "full": self._recency,
            "tail": self._recency,
        }
        if name not in choices:
            raise ValueError(f"policy = {name!r} is unknown: use {', '.join(self.NAMES)}")
        return choices[name](case, self.fixed_length(name) or wc_length)

    def fixed_length(self, name: str) -> int | None:
        """The length of a bound, which no budget changes; None for all other policies."""
        return {"full": self.geometry.seq_len, "tail": self.mc.recent_tokens}.get(name)

    def _recency(self, case: Case, wc_length: int) -> Plan:
        starts = torch.arange(
            self.geometry.seq_len - wc_length, self.geometry.seq_len, device=self.device
        )
        starts = starts.expand(len(case.ids), -1).contiguous()
        return torch.zeros_like(starts), starts

    def _random(self, case: Case, wc_length: int) -> Plan:
        allocator = TrainingWCVariationAllocator.of(self.mc, wc_length)
        plans = [allocator.sample(1, (self.seed, index)) for index in case.ids]
        lods, starts = (
            torch.from_numpy(np.concatenate(parts)).to(self.device)
            for parts in zip(*plans, strict=True)
        )
        return lods, starts

    def _uniform(self, case: Case, wc_length: int) -> Plan:
        return self._cover(
            uniform_blocks(1, self.geometry, wc_length, self.device), case, wc_length
        )

    def _cover(self, blocks: Tensor, case: Case, wc_length: int) -> Plan:
        """The same cover, block LODs [1, n_1], for every row."""
        lods, starts = plan_of_blocks(blocks, self.geometry, wc_length)
        return lods.expand(len(case.ids), -1).contiguous(), starts.expand(
            len(case.ids), -1
        ).contiguous()

    def _focused(self, case: Case, wc_length: int, score: Scorer) -> Plan:
        """Focus starts from the even cover, here as in sessions: a choice depends on the history alone."""
        allocator = self.controller.focus_allocator(
            lambda c: FocusAllocator(c, self.geometry, self.focus)
        )
        start = self._cover(even_blocks(1, self.geometry, wc_length, self.device), case, wc_length)
        return allocator.focus(*start, score=score)

    def _blind(self, case: Case, wc_length: int) -> Plan:
        if case.before is None:
            raise ValueError("policy = 'blind' needs other sequences, whose tails it reads")
        return self._focused(
            case,
            wc_length,
            lens_scorer(self.controller, with_tails(case.nodes, case.before, self.mc), self.mc),
        )

    def _other_question(self, case: Case, wc_length: int) -> Plan:
        if case.other_nodes is None:
            raise ValueError("policy = 'other_question' needs the sequences with another question")
        return self._focused(
            case, wc_length, lens_scorer(self.controller, case.other_nodes, self.mc)
        )

    def _oracle(self, case: Case, wc_length: int) -> Plan:
        matters = torch.zeros(len(case.ids), self.geometry.seq_len + 1, device=self.device)
        for row, spans in enumerate(case.spans):
            for first, last in spans:
                matters[row, first:last] = 1
        before = torch.nn.functional.pad(matters.cumsum(1), (1, 0))

        def score(lods: Tensor, starts: Tensor) -> Tensor:
            ends = starts + self.geometry.block_size**lods
            touched = before.gather(1, ends) > before.gather(1, starts)
            return touched + 1e-3 * ends / self.geometry.seq_len

        exhaustive = FocusConfig(
            iterations=2 * self.geometry.max_lod,
            max_replacements=self.geometry.max_units,
            threshold=0.0,
            cooldown=0,
        )
        allocator = self.controller.focus_allocator(
            lambda c: FocusAllocator(c, self.geometry, exhaustive)
        )
        return allocator.focus(*self._uniform(case, wc_length), score=_spread(score, self.geometry))


def lens_scorer(controller: MCController, nodes: NodeTable, mc: MCConfig) -> Scorer:
    """LensNet over the given trees."""

    def score(lods: Tensor, starts: Tensor) -> Tensor:
        visible = lods.size(1) - mc.horizon_tokens
        entries = gather_entries(
            nodes.nodes, node_index(lods[:, :visible], starts[:, :visible], mc.geometry)
        )
        return controller.score(entries, lods, starts, nodes.lod0)

    return score


def with_tails(nodes: NodeTable, other: NodeTable, mc: MCConfig) -> NodeTable:
    """`nodes` as LensNet sees them with the visible tails of `other`, row by row: entries, and so index vectors and ask keys too."""
    tail = slice(
        mc.seq_len - mc.recent_tokens, mc.seq_len - mc.horizon_tokens
    )  # LOD0 is the first level of the table
    mixed = NodeTable(nodes.nodes.clone(), nodes.lod0.clone())
    mixed.nodes[:, tail] = other.nodes[:, tail]
    mixed.lod0[:, tail] = other.lod0[:, tail]
    return mixed


def _spread(score: Scorer, geometry: Geometry) -> Scorer:
    """Gives every token of an open block the block's largest score, so that the block's mean is that of its best entry."""

    def spread(lods: Tensor, starts: Tensor) -> Tensor:
        raw = score(lods, starts)
        block = starts // geometry.block_size
        best = torch.full(
            (len(raw), geometry.seq_len // geometry.block_size + 1), -torch.inf, device=raw.device
        )
        best = best.scatter_reduce(1, block, raw, "amax")
        return torch.where(lods == 0, best.gather(1, block), raw)

    return spread
