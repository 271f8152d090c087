"""Choose the working contexts of a session by its policy, for a window of the history.

Before a loss or a generation (a *question*), the context depends on the history alone: focus starts
from the even cover, as in evaluation, or in a longer history from the blocks that a search finds,
and runs all its rounds. During a generation, focus edits the current context in one round; edits
that invalidate more of the key/value cache need a larger gain.

Legend: W entries, h horizon, V visible tokens, n_1 head blocks, K block size, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import FocusConfig, MCConfig
from mc_ds.focus import (
    FocusAllocator,
    Scorer,
    block_lods,
    covering_entries,
    even_blocks,
    plan_of_blocks,
    uniform_blocks,
)
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import Access, Needs, last_tokens
from mc_ds.focus.view import Plan, Round
from mc_ds.geometry import Geometry, lod1_cover
from mc_ds.inference.networks import Networks
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.candidates import SHORTLIST, Candidates, best_rescored, with_at_lod1
from mc_ds.inference.reading.lens import TreeLens
from mc_ds.inference.reading.search import BlockSearch, searchable
from mc_ds.inference.reading.window import Window
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.positions import rotary_tables

SEARCH_CANDIDATES = 32
"""Default number of blocks that a search expands to LOD1."""
FOLLOWING_SHARE = 4
"""During a generation, 1/4 as many candidates are searched as at a question, since there is no
rescoring to select the best of them.
"""
PLANNED_ON_HOST = 4096
"""Up to so many blocks, plans are made on the host. They are small tables of integers then, and a
GPU takes longer to launch the many operations than the host to compute them.
"""
OPENED_UP_TO = 1
"""Coarsest level whose nodes focus expands after a search. Nodes above it hold no block that the
search chose.
"""


@dataclass(frozen=True, eq=False)
class Context:
    """A working context of W entries. The last h entries are the last known token and room for the
    next h - 1 tokens.
    """

    window: Window
    lods: NDArray[np.int64]
    """[W]."""
    starts: NDArray[np.int64]
    """[W]: first token of each entry, counted from the beginning of the history."""
    rescored: NDArray[np.float32] | None = None
    """LensNet's scores of the window's head blocks [n_1] from the last search at a question, NaN
    for those that were not rescored.
    """
    rounds: tuple[Round, ...] = ()
    """The rounds of focus that led to it; their `starts` count from the window's first token."""


class Contexts:
    """Chooses the working contexts of one tree by one policy. Valid inside
    `controller.inference()`.
    """

    def __init__(
        self, networks: Networks, tree: MegaContextTree, settings: Settings, phases: Phases
    ) -> None:
        self.networks, self.tree, self.settings, self.phases = networks, tree, settings, phases
        self._policy = settings.spec
        self.lens = self._lens() if self._policy.needs is Needs.LENSNET else None
        self.candidates = self._candidates(self.lens) if self.lens is not None else None

    def choose(self, window: Window, present: Context | None = None) -> Context:
        """Return a context for `window`: an edit of `present` (the context before the last tokens
        were added) if given, otherwise one chosen from the history alone.
        """
        choose = last_tokens if window.geometry is None else self._policy.choose
        plan = choose(HistoryView(self, window, present), window.length)
        return Context(
            window,
            plan.lods[0].cpu().numpy(),
            plan.starts[0].cpu().numpy() + window.first,
            None if plan.rescored is None else plan.rescored[0].cpu().numpy(),
            plan.rounds,
        )

    def forget(self, count: int) -> None:
        """Discard results that depend on tokens after the first `count`."""
        if self.candidates is not None:
            self.candidates.forget(count)

    def _lens(self) -> TreeLens:
        networks, tail = self.networks, self.settings.tail
        assert networks.lensnet is not None
        return TreeLens(
            networks.lensnet,
            networks.controller,
            self.tree,
            self.phases,
            tail=None if tail is None else torch.tensor(tail, device=networks.device),
            blind=self._policy.access is Access.UNRELATED_TAIL,
        )

    def _candidates(self, lens: TreeLens) -> Candidates | None:
        lensnet, wanted = self.networks.lensnet, self.settings.search
        at_most = SEARCH_CANDIDATES if wanted is None or wanted is True else int(wanted)
        if lensnet is None or not at_most or not searchable(lensnet):
            return None
        mc = self.networks.mc
        return Candidates(
            BlockSearch(lensnet, self.tree),
            lens,
            self.tree,
            mc,
            self.phases,
            at_most=at_most,
            beyond=mc.seq_len if wanted is None else 0,
        )


class HistoryView:
    """What a policy may read of a window of a session's history. Implements `focus.view.View`.
    Plans count tokens from the beginning of the window.
    """

    answers: Tensor | None = None

    def __init__(
        self, contexts: Contexts, window: Window, present: Context | None, earlier: int = 0
    ) -> None:
        """`earlier`: number of tokens of the history that are left out behind the window."""
        networks = contexts.networks
        self.mc: MCConfig = networks.mc
        self.focus_config: FocusConfig = contexts.settings.focus
        self.controller: MCController = networks.controller
        self.seeds: Sequence[tuple[int, ...]] = [contexts.settings.seed]
        on_host = window.seq_len <= PLANNED_ON_HOST * networks.mc.block_size
        self.device = torch.device("cpu") if on_host else networks.device
        self._contexts, self._window, self._present = contexts, window, present
        self._left_out = earlier

    @property
    def seq_len(self) -> int:
        """Number of input tokens of the window, horizon included."""
        return self._window.seq_len

    @property
    def geometry(self) -> Geometry:
        """Geometry of the window's input tokens."""
        assert self._window.geometry is not None
        return self._window.geometry

    @property
    def visible(self) -> Tensor:
        """The window's known tokens except the last one, int64 [1, V]."""
        window = self._window
        return self._contexts.tree.tokens(window.first, window.known - 1)[None]

    def embeddings(self) -> Tensor:
        """Return the embeddings of the visible tokens, [1, V, D]."""
        return self._contexts.networks.nets.embed(self.visible)

    @torch.no_grad()
    def attention(self, queries: int) -> Tensor:
        """Return the attention that the visible tokens get when the backbone reads all of them, [1,
        V].
        """
        backbone, mc = self._contexts.networks.backbone, self.mc
        starts = torch.arange(self.visible.size(1), device=self.visible.device)[None]
        tables = rotary_tables(
            torch.zeros_like(starts),
            starts,
            block_size=mc.block_size,
            head_dim=backbone.config.head_dim,
            base=backbone.config.rope_base,
            scheme=mc.position_scheme,
        )
        return backbone.attention(self.embeddings(), *tables, queries)

    def lens_scores(self, lods: Tensor, starts: Tensor) -> Tensor:
        """Return LensNet's scores of a plan, [1, W], with 0 in the horizon, on the device of plans:
        if that is the host, this waits for them.
        """
        lens, window = self._contexts.lens, self._window
        assert lens is not None
        visible = lods.size(1) - window.horizon
        starts = starts[:, :visible] + window.first
        scores = lens.scores(lods[:, :visible], starts, window.known, earlier=self._left_out)
        return F.pad(scores.to(self.device), (0, window.horizon))

    def lens_blocks(self, earlier: int = 0) -> Tensor:
        """Return LensNet's scores of the head blocks in the LOD1 cover, [1, n_1]; see `View`. In a
        history that a search reads, blocks that it did not find have -inf; earlier scores are then
        all -inf.
        """
        candidates, count = self._contexts.candidates, self.geometry.head_nodes[1]
        searched = candidates is not None and self._window.known > candidates.beyond
        if earlier:
            then = None if searched else self._earlier(earlier)
            scores = torch.empty(1, 0) if then is None else then.lens_blocks()
            found = scores.to(self.device)  # plans of a shorter history may be made elsewhere
            return F.pad(found, (0, count - found.size(1)), value=-torch.inf)
        if candidates is not None and searched:
            every = torch.ones(count, dtype=torch.bool, device=self.device)
            found = candidates.matching(self._window, every, SHORTLIST)
            return candidates.rescored(self._window, found).nan_to_num(-torch.inf)
        lods, starts = lod1_cover(self.geometry, self.device)
        return self.lens_scores(lods[None], starts[None])[:, :count].float()

    def _earlier(self, tokens: int) -> "HistoryView | None":
        """Return the view of the history without its last tokens; None if no head block is left."""
        window, shorter = self._window, self.seq_len - tokens
        if shorter - self.mc.recent_tokens < self.mc.block_size:
            return None
        geometry = self.geometry.with_length(shorter)
        before = replace(window, known=window.known - tokens, geometry=geometry)
        return HistoryView(self._contexts, before, self._present, tokens)

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        """Return the context that focus makes: from the current context if there is one, else from
        the blocks that a search finds, else from the even cover.
        """
        if self._present is not None:
            return self._following(self._present, score, wc_length)
        even = even_blocks(1, self.geometry, wc_length, self.device)
        candidates = self._contexts.candidates
        count = 0 if candidates is None else candidates.count(self._window, even)
        if candidates is None or not count:
            start = plan_of_blocks(even, self.geometry, wc_length)
            return Plan(*self._allocator().focus(*start, score=score))
        return self._searched(candidates, count, score, wc_length)

    def _searched(self, candidates: Candidates, count: int, score: Scorer, wc_length: int) -> Plan:
        """Return the context that focus makes from the uniform cover, in which the `count`
        candidates with LensNet's highest scores were expanded to LOD1.
        """
        geometry, window = self.geometry, self._window
        room = count * (geometry.max_lod - 1) * (geometry.block_size - 1)
        blocks = uniform_blocks(1, geometry, wc_length - room, self.device)
        hidden = blocks[0] > 1  # blocks in nodes coarser than LOD1
        rescored = candidates.rescored(window, candidates.matching(window, hidden, SHORTLIST))
        focused = self._allocator().focus(
            *with_at_lod1(blocks, geometry, best_rescored(rescored, hidden, count)),
            score=score,
            wc_length=wc_length,
            rescored=rescored,
            expand_up_to=OPENED_UP_TO,
        )
        return Plan(*focused, rescored)

    def _following(self, present: Context, score: Scorer, wc_length: int) -> Plan:
        """Return the current context with the new tokens at its end, after one round of edits."""
        geometry, window, candidates = self.geometry, self._window, self._contexts.candidates
        # Entries of the current context within this window, then the tokens known since.
        seen = slice(int(np.searchsorted(present.starts, window.first)), present.window.visible)
        added = np.arange(present.window.known - 1, window.first + window.seq_len)
        lods = self._row(np.concatenate([present.lods[seen], np.zeros_like(added)]))
        starts = self._row(np.concatenate([present.starts[seen], added]) - window.first)
        blocks, rescored, held = block_lods(lods, starts, geometry), self._carried(present), None
        if rescored is not None and candidates is not None:
            # Open blocks keep their rescored values; LensNet scores all others in this context.
            held = rescored.masked_fill(blocks != 0, torch.nan)
            count = max(1, candidates.at_most // FOLLOWING_SHARE)
            found = candidates.matching(window, blocks[0] > 1, count)
            lods, starts = with_at_lod1(blocks, geometry, found)
        # Fraction of the context's cache that an edit of each block would invalidate.
        recomputed = 1 - covering_entries(starts, geometry) / starts.size(1)
        focused = self._allocator().focus(
            lods,
            starts,
            score=score,
            wc_length=wc_length,
            iterations=1,
            edit_penalty=self._contexts.settings.keep_prefix * recomputed,
            rescored=held,
            expand_up_to=None if held is None else OPENED_UP_TO,
        )
        return Plan(*focused, rescored)

    def _carried(self, present: Context) -> Tensor | None:
        """Return the rescored values of the current context's blocks, indexed as in this window,
        [1, n_1]; None if there are none.
        """
        if present.rescored is None:
            return None
        left_out = (self._window.first - present.window.first) // self.mc.block_size
        rescored = torch.full((1, self.geometry.head_nodes[1]), torch.nan, device=self.device)
        kept = torch.from_numpy(present.rescored[left_out:]).to(self.device)
        rescored[0, : kept.numel()] = kept
        return rescored

    def _allocator(self) -> FocusAllocator:
        return FocusAllocator(self.controller, self.geometry, self.focus_config)

    def _row(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values)[None].to(self.device)
