"""Evaluate policies on batches of sequences with the root module.

Called with tokens alone, the root module returns the node table, from which policies choose
contexts; called with contexts, it returns the losses.

Legend: B sequences (one per row), T tokens, W entries, h horizon, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.evaluation.measure import Samples
from mc_ds.evaluation.records import Measured
from mc_ds.focus.allocator import FocusAllocator, Scorer
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import Access, PolicySpec, even_cover
from mc_ds.focus.view import Plan
from mc_ds.geometry import Geometry, lod1_cover, node_index
from mc_ds.model.gather import gather_entries
from mc_ds.model.megacontext import Attention, ModelOutput, NodeTable
from mc_ds.tasks import TaskSample

Forward = Callable[..., ModelOutput | NodeTable | Attention]
"""The root module or the engine around it. Given tokens it returns their node table; given tokens,
a plan and a mask, the losses; given `attended_by`, the attention of the last tokens.
"""


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """What a policy may read of B sequences: their tokens, node tables and spans, but no loss.
    Implements `focus.view.View`.
    """

    mc: MCConfig
    controller: MCController
    focus_config: FocusConfig
    forward: Forward
    tokens: Tensor
    """[B, T + 1]; policies read only those before the horizon."""
    nodes: NodeTable
    """Node table of the B sequences."""
    lens_tokens: Tensor
    """[B, T + 1]: the tokens as LensNet reads them, perhaps with another tail; see `nodes`."""
    earlier: tuple[NodeTable, Tensor] | None = None
    """`nodes` and `lens_tokens` for the scores of `focus.earlier_tokens` earlier, whose tail lies
    elsewhere; None: the same.
    """
    spans: Sequence[NDArray[np.int64]]
    """Per sequence, the token ranges [n, 2] of the facts needed for the answers."""
    seeds: Sequence[tuple[int, ...]]
    device: torch.device

    @property
    def seq_len(self) -> int:
        """Number T of input tokens, horizon included."""
        return self.mc.seq_len

    @property
    def geometry(self) -> Geometry:
        """Geometry of the T tokens."""
        return self.mc.geometry

    @property
    def visible(self) -> Tensor:
        """Tokens before the horizon, int64 [B, T - h]."""
        return self.tokens[:, : self.seq_len - self.mc.horizon_tokens]

    def embeddings(self) -> Tensor:
        """Return the embeddings of the visible tokens, [B, T - h, D]."""
        return self.nodes.lod0[:, : self.visible.size(1)]

    def attention(self, queries: int) -> Tensor:
        """Return the attention on the visible tokens, [B, T - h]; costs one call of `forward`."""
        attention = self.forward(self.visible, attended_by=queries)
        assert isinstance(attention, Attention)
        return attention.mass

    def lens_scores(self, lods: Tensor, starts: Tensor, earlier: int = 0) -> Tensor:
        """Return LensNet's scores of a plan, [B, W], with 0 for its last h + `earlier` entries,
        which LensNet does not see.
        """
        visible = lods.size(1) - self.mc.horizon_tokens - earlier
        nodes, tokens = self.nodes, self.lens_tokens
        if earlier and self.earlier is not None:
            nodes, tokens = self.earlier
        entries = gather_entries(
            nodes.nodes, node_index(lods[:, :visible], starts[:, :visible], self.geometry)
        )
        return self.controller.score(entries, lods, starts, nodes.lod0, tokens)

    def lens_blocks(self, earlier: int = 0) -> Tensor:
        """Return LensNet's scores of the head blocks in the LOD1 cover, [B, n_1]; see `View`."""
        rows, count = len(self.seeds), self.geometry.head_nodes[1]
        tail = self.mc.recent_tokens + earlier
        if self.seq_len - tail < self.mc.block_size:
            return torch.full((rows, count), -torch.inf, device=self.device)
        geometry = replace(self.geometry, recent_tokens=tail)
        lods, starts = lod1_cover(geometry, self.device)
        scores = self.lens_scores(lods.expand(rows, -1), starts.expand(rows, -1), earlier)
        scores = scores[:, : geometry.head_nodes[1]].float()
        return F.pad(scores, (0, count - scores.size(1)), value=-torch.inf)

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        """Return the context that focus makes, starting from the even cover so that the result
        depends on the history alone.
        """
        allocator = FocusAllocator(self.controller, self.geometry, self.focus_config)
        lods, starts = even_cover(self, wc_length)[:2]
        return Plan(*allocator.focus(lods, starts, score=score))

    @property
    def answers(self) -> Tensor:
        """Mask of the tokens in any of the `spans`, bool [B, T]."""
        found = torch.zeros(len(self.seeds), self.seq_len, dtype=torch.bool, device=self.device)
        for row, spans in enumerate(self.spans):
            for first, last in spans:
                found[row, first:last] = True
        return found


@dataclass(frozen=True)
class BatchReading:
    """A batch of sequences with computed node tables. Implements `measure.Reading`."""

    forward: Forward
    tokens: Tensor
    """[B, T + 1]."""
    mask: Tensor
    """[B, h]."""
    views: dict[Access, BatchView]
    """A view for each kind of access that policies may have."""

    def plan(self, spec: PolicySpec, wc_length: int) -> Plan:
        """Return the contexts that a policy chooses."""
        return spec.choose(self.views[spec.access], wc_length)

    def measure(self, spec: PolicySpec, wc_length: int) -> Measured:
        """Run one forward over the contexts that a policy chooses, and return the losses."""
        plan = self.plan(spec, wc_length)
        output = self._read(plan)
        correct = output.horizon_likeliest == self.tokens[:, -self.mask.size(1) :]
        return Measured(output.row_scores, correct, plan)

    def losses(self, plan: Plan) -> Tensor:
        """Run one forward over the contexts of `plan`, and return the loss of every entry on the
        token after its span, float32 [B, W]. The last h entries predict the horizon.
        """
        return self._read(plan).entry_nll

    def _read(self, plan: Plan) -> ModelOutput:
        output = self.forward(self.tokens, plan.lods, plan.starts, self.mask)
        assert isinstance(output, ModelOutput)
        return output

    def written(self, spec: PolicySpec, wc_length: int, count: int) -> Tensor:
        """Generate `count` <= h tokens after the visible history by greedy decoding, in the
        contexts that a policy chooses; return them, int64 [B, count]. Costs one forward per token.
        The sequences' own tokens in the horizon are not read.
        """
        plan, tokens = self.plan(spec, wc_length), self.tokens.clone()
        targets = tokens[:, -self.mask.size(1) :]
        targets.zero_()
        for place in range(count):
            output = self.forward(tokens, plan.lods, plan.starts, self.mask)
            assert isinstance(output, ModelOutput)
            targets[:, place] = output.horizon_likeliest[:, place]
        return targets[:, :count]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Reads sequences with the root module. Implements `measure.Reader`. Valid inside
    `controller.inference()`.
    """

    forward: Forward
    mc: MCConfig
    controller: MCController
    focus: FocusConfig
    seed: int
    """Seed of random choices."""
    batch_size: int
    device: torch.device

    def read(self, samples: Samples, specs: Sequence[PolicySpec]) -> BatchReading:
        """Compute the node tables that the policies need, each by one call of `forward`.

        Where a sample has no alternative question, its own is used instead.
        """
        tokens = self._tokens(samples.samples)
        visible = self._nodes(tokens), tokens
        earlier: dict[Access, tuple[NodeTable, Tensor]] = {}
        read = dict.fromkeys((Access.VISIBLE, Access.LENGTH, Access.ANSWERS), visible)
        read[Access.ATTENTION] = visible
        needed = {spec.access for spec in specs}
        if Access.OTHER_QUESTION in needed:
            others = self._tokens([sample.other or sample for sample in samples.samples])
            read[Access.OTHER_QUESTION] = self._nodes(others), others
        if Access.UNRELATED_TAIL in needed:
            before = self._tokens(samples.before)
            unrelated = self._nodes(before), before
            read[Access.UNRELATED_TAIL] = self._mixed(visible, unrelated, 0)
            if ago := self.focus.earlier_tokens:
                earlier[Access.UNRELATED_TAIL] = self._mixed(visible, unrelated, ago)
        masks = np.stack([sample.horizon_mask for sample in samples.samples])
        views = {
            access: self._view(samples, tokens, *parts, earlier.get(access))
            for access, parts in read.items()
        }
        return BatchReading(self.forward, tokens, torch.from_numpy(masks).to(self.device), views)

    def _mixed(
        self, own: tuple[NodeTable, Tensor], other: tuple[NodeTable, Tensor], earlier: int
    ) -> tuple[NodeTable, Tensor]:
        """Return what LensNet reads of sequences that have the tail of `other`."""
        tokens = _with_tail(own[1], other[1], self.mc, earlier)
        return with_tails(own[0], other[0], self.mc, earlier), tokens

    def _view(
        self,
        samples: Samples,
        tokens: Tensor,
        nodes: NodeTable,
        lens_tokens: Tensor,
        earlier: tuple[NodeTable, Tensor] | None,
    ) -> BatchView:
        return BatchView(
            mc=self.mc,
            controller=self.controller,
            focus_config=self.focus,
            forward=self.forward,
            tokens=tokens,
            nodes=nodes,
            lens_tokens=lens_tokens,
            earlier=earlier,
            spans=[sample.spans for sample in samples.samples],
            seeds=[(self.seed, index) for index in samples.ids],
            device=self.device,
        )

    def _tokens(self, samples: Sequence[TaskSample]) -> Tensor:
        return torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(self.device)

    def _nodes(self, tokens: Tensor) -> NodeTable:
        nodes = self.forward(tokens)
        assert isinstance(nodes, NodeTable)
        return nodes


def with_tails(nodes: NodeTable, other: NodeTable, mc: MCConfig, earlier: int = 0) -> NodeTable:
    """Return a copy of `nodes` in which each row's visible tail, as it is or was `earlier` tokens
    before, is taken from the same row of `other`. LensNet's entries, index vectors and ask keys are
    computed from it.
    """
    # LOD0 comes first in the table, so places of the tail are token positions.
    return NodeTable(
        _with_tail(nodes.nodes, other.nodes, mc, earlier),
        _with_tail(nodes.lod0, other.lod0, mc, earlier),
    )


def _with_tail(of_tokens: Tensor, other: Tensor, mc: MCConfig, earlier: int) -> Tensor:
    """Return a copy of `of_tokens` [B, T or more, ...] with the visible tail of `other`."""
    end = max(0, mc.seq_len - earlier)
    tail = slice(max(0, end - mc.recent_tokens), max(0, end - mc.horizon_tokens))
    mixed = of_tokens.clone()
    mixed[:, tail] = other[:, tail]
    return mixed
