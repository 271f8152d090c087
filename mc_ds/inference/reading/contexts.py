"""Working contexts of a session: what a policy chooses for a window of the history.

A choice for a question, before a loss or a generation, is a function of the history alone: focus starts from the even cover, as in
evaluation, or from what a search finds in a longer history, and takes all its rounds. While tokens are generated, a choice follows on the
present context with one round of edits, which are held back the more of the decoder's cache they would undo.

Legend: W entries, h horizon, M = W - h visible entries, n_1 head blocks, I width of index vectors, Q visible tail tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.focus import (
    FocusAllocator,
    Scorer,
    block_lods,
    covering_entries,
    even_blocks,
    open_nodes,
    plan_of_blocks,
    uniform_blocks,
    units_used,
)
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.search import BlockSearch, searchable
from mc_ds.inference.reading.window import Window
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.lensnet import LensNet
from mc_ds.variants import TrainingWCVariationAllocator

Lods = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Heard:
    """LensNet's scores of some blocks of the history."""

    blocks: NDArray[np.int64]
    """[n], counted from the start of the history."""
    scores: NDArray[np.float32]
    """[n]."""

    def over(self, first: int, count: int) -> Tensor:
        """Scores [1, count] of the blocks from `first` on, NaN for those that were not heard."""
        here = (self.blocks >= first) & (self.blocks < first + count)
        scores = torch.full((1, count), torch.nan)
        scores[0, torch.from_numpy(self.blocks[here] - first)] = torch.from_numpy(self.scores[here])
        return scores


@dataclass(frozen=True, eq=False)
class Context:
    """A working context with room: W entries, the last h of them the last known token and places for the next h - 1."""

    window: Window
    lods: Lods
    """[W]."""
    starts: Lods
    """[W], tokens of the history."""
    heard: Heard | None = None
    """What LensNet said of blocks at the last search for a question."""


class Policy(Protocol):
    """A way to choose the working contexts of one session."""

    def choose(self, window: Window) -> Context:
        """The context of a window, from the history alone."""
        ...

    def follow(self, window: Window, present: Context) -> Context:
        """The context of a window in which the tokens since `present` are new."""
        ...

    def forget(self, count: int) -> None:
        """The history was cut to `count` tokens."""
        ...


class LensInput(nn.Module):
    """LensNet as the controller calls it here: on entries and index vectors that a tree holds already."""

    def __init__(self, lensnet: LensNet) -> None:
        super().__init__()
        self.lensnet = lensnet

    def forward(
        self, entries_RMD: Tensor, lods_RM: Tensor, starts_RM: Tensor, index_RMI: Tensor | None
    ) -> Tensor:
        """Scores [R, M]."""
        return self.lensnet.score(entries_RMD, lods_RM, starts_RM, index_RMI)


def tokens_only(window: Window) -> Context:
    """Every input of the window at LOD0, or the last W of them."""
    starts = np.arange(
        window.first + window.seq_len - window.length, window.first + window.seq_len, dtype=np.int64
    )
    return Context(window, np.zeros_like(starts), starts)


class Recency:
    """The last W inputs at LOD0."""

    def choose(self, window: Window) -> Context:
        """The last W inputs."""
        return tokens_only(window)

    def follow(self, window: Window, present: Context) -> Context:
        """The last W inputs."""
        return tokens_only(window)

    def forget(self, count: int) -> None:
        """Nothing is kept."""


class Uniform(Recency):
    """The coarsest cover with the most recent detail opened."""

    def choose(self, window: Window) -> Context:
        """The uniform cover of exactly W entries."""
        if window.geometry is None:
            return tokens_only(window)
        blocks = uniform_blocks(1, window.geometry, window.length, torch.device("cpu"))
        return context_of(window, *plan_of_blocks(blocks, window.geometry, window.length))

    def follow(self, window: Window, present: Context) -> Context:
        """The same: it does not depend on the present."""
        return self.choose(window)


class Random(Uniform):
    """A random cover of exactly W entries, drawn as in training."""

    def __init__(self, mc: MCConfig, seed: tuple[int, ...]) -> None:
        self._mc, self._seed = mc, seed

    def choose(self, window: Window) -> Context:
        """The variant of this seed."""
        if window.geometry is None:
            return tokens_only(window)
        mc = self._mc.model_copy(update={"seq_len": window.geometry.seq_len})
        lods, starts = TrainingWCVariationAllocator.of(mc, window.length).sample(1, self._seed)
        return context_of(window, torch.from_numpy(lods), torch.from_numpy(starts))


class Lens:
    """LensNet's scores through the focus allocator."""

    SHORTLIST = 4096
    """Best matching blocks of a search that LensNet hears at a question."""
    FOLLOWING_SHARE = 4
    """Candidates of a search at a question for each one while generating, when LensNet compares them only in the context itself."""
    OPENED_UP_TO = 1
    """The highest level whose nodes focus expands after a search: what the search left under coarser ones stays there."""

    def __init__(
        self,
        lensnet: LensNet,
        controller: MCController,
        tree: MegaContextTree,
        focus: FocusConfig,
        phases: Phases,
        *,
        search: int,
        search_beyond: int,
        keep_prefix: float,
        tail: Tensor | None,
        blind: bool,
    ) -> None:
        """`search` candidates at most, in histories longer than `search_beyond` tokens. `tail` [>= Q] stands in for the visible tail.

        `blind` without a `tail` reads the Q tokens that end in the middle of the history in its place.
        """
        self._lensnet, self._controller, self._tree, self._focus, self._phases = (
            lensnet,
            controller,
            tree,
            focus,
            phases,
        )
        self._mc, self._horizon, self._tail_len = (
            lensnet.config,
            lensnet.config.horizon_tokens,
            lensnet.tail_len,
        )
        self._search = BlockSearch(lensnet, tree) if search and searchable(lensnet) else None
        self._candidates, self._search_beyond, self._keep_prefix = (
            search,
            search_beyond,
            keep_prefix,
        )
        if tail is not None and tail.numel() < self._tail_len:
            raise ConfigError(
                f"tail: {tail.numel()} tokens cannot stand in for a visible tail of {self._tail_len}: give at least as many"
            )
        self._given_tail = tail[-self._tail_len :] if tail is not None else None
        self._blind = blind

    def choose(self, window: Window) -> Context:
        """Focus from the even cover; after a search from the uniform one, with the blocks that were found brought to its surface."""
        if window.geometry is None:
            return tokens_only(window)
        geometry, length = window.geometry, window.length
        with self._phases("allocator"):
            allocator, score = self._allocator(geometry), self._scorer(window)
            even = even_blocks(1, geometry, length, self._tree.device)
            levels, spare = geometry.max_lod - 1, geometry.max_units - geometry.units(length)
            searches = (
                self._search is not None
                and window.known > self._search_beyond
                and bool((even > 1).any())
            )
            count = (
                min(self._candidates, spare // (2 * levels)) if searches else 0
            )  # half of what is to spare is left to open them
            if not count:
                return context_of(
                    window, *allocator.focus(*plan_of_blocks(even, geometry, length), score=score)
                )
            blocks = uniform_blocks(
                1, geometry, length - count * levels * (geometry.block_size - 1), self._tree.device
            )
            heard = self._hear(window, self._best_matching(window, blocks[0] > 1, self.SHORTLIST))
            focused = allocator.focus(
                *self._surfaced(
                    window, blocks, self._best_heard(window, heard, blocks[0] > 1, count)
                ),
                score=score,
                wc_length=length,
                heard=self._over(window, heard),
                expand_up_to=self.OPENED_UP_TO,
            )
            return context_of(window, *focused, heard)

    def follow(self, window: Window, present: Context) -> Context:
        """One round of edits of the present context, with the new tokens at its end."""
        if window.geometry is None:
            return tokens_only(window)
        geometry = window.geometry
        with self._phases("allocator"):
            seen = slice(int(np.searchsorted(present.starts, window.first)), present.window.visible)
            added = np.arange(present.window.known - 1, window.first + window.seq_len)
            lods = self._row(np.concatenate([present.lods[seen], np.zeros_like(added)]))
            starts = self._row(np.concatenate([present.starts[seen], added]) - window.first)
            blocks, heard = block_lods(lods, starts, geometry), None
            if present.heard is not None:
                # What was found at the question stays open for what was heard of it; all else LensNet judges where it stands.
                heard = self._over(window, present.heard).masked_fill(blocks != 0, torch.nan)
                count = max(1, self._candidates // self.FOLLOWING_SHARE)
                lods, starts = self._surfaced(
                    window, blocks, self._best_matching(window, blocks[0] > 1, count)
                )
            focused = self._allocator(geometry).focus(
                lods,
                starts,
                score=self._scorer(window),
                wc_length=window.length,
                iterations=1,
                reluctance=self._keep_prefix
                * (1 - covering_entries(starts, geometry) / starts.size(1)),
                heard=heard,
                expand_up_to=None if heard is None else self.OPENED_UP_TO,
            )
            return context_of(window, *focused, present.heard)

    def forget(self, count: int) -> None:
        """The search forgets the nodes that are no more."""
        if self._search is not None:
            self._search.forget(count // self._mc.block_size)

    def _allocator(self, geometry: Geometry) -> FocusAllocator:
        return self._controller.focus_allocator(
            lambda controller: FocusAllocator(controller, geometry, self._focus)
        )

    def _scorer(self, window: Window) -> Scorer:
        """LensNet over the visible entries of a plan of the window; zero in the horizon."""
        tail = self._stand_in(window)

        def score(lods: Tensor, starts: Tensor) -> Tensor:
            visible = lods.size(1) - self._horizon
            return F.pad(
                self._scores(lods[:, :visible], starts[:, :visible] + window.first, tail),
                (0, self._horizon),
            )

        return score

    def _scores(
        self,
        lods_1M: Tensor,
        starts_1M: Tensor,
        tail: Tensor | None,
        *,
        seen_at: Tensor | None = None,
    ) -> Tensor:
        """LensNet's scores [1, M] of entries that end with the visible tail, in whose place it reads the tokens `tail`, if given.

        To LensNet they start at `seen_at` [1, M], where given.
        """
        with self._phases("tree"):
            on_host = lods_1M[0].cpu(), starts_1M[0].cpu()
            entries, index = self._tree.entries(*on_host), self._tree.entry_index(*on_host)
            if tail is not None:
                embedded = self._tree.nets.embed(tail)
                entries = torch.cat([entries[: -self._tail_len], embedded])
                index = torch.cat([index[: -self._tail_len], self._tree.nets.token_index(embedded)])
        with self._phases("lens"):
            starts_1M = starts_1M if seen_at is None else seen_at
            return self._controller.score(
                entries[None],
                lods_1M,
                starts_1M,
                index[None] if self._lensnet.index is not None else None,
            )

    def _stand_in(self, window: Window) -> Tensor | None:
        """Tokens [Q] that stand in for the visible tail; None: it stands for itself."""
        if self._given_tail is not None or not self._blind:
            return self._given_tail
        end = max(self._tail_len, (window.known - 1) // 2)
        return self._tree.tokens(end - self._tail_len, end)

    def _best_matching(self, window: Window, hidden: Tensor, most: int) -> Tensor:
        """Places in the window of at most `most` blocks of `hidden`, bool [n_1], that match the visible tail best; the best first."""
        assert self._search is not None
        first, tail = window.first // self._mc.block_size, self._stand_in(window)
        with self._phases("search"):
            asked = (
                self._tree.tokens(window.known - 1 - self._tail_len, window.known - 1)
                if tail is None
                else tail
            )
            index = self._tree.nets.token_index(self._tree.nets.embed(asked))
            matches = self._search.scores(index, first, first + hidden.numel()).masked_fill(
                ~hidden, -torch.inf
            )
            return matches.topk(min(most, int(hidden.sum()))).indices

    @torch.no_grad()
    def _hear(self, window: Window, shortlist: Tensor) -> Heard:
        """LensNet's scores of the blocks of a shortlist, each in a context like those it was trained on.

        As many at a time as a training history has, at LOD1, before the most recent tokens; blocks among these are scored at LOD0. (In a
        context of a million tokens nearly all entries are coarse, which LensNet never saw: its scores there mean little.)
        """
        block, first, visible = (
            self._mc.block_size,
            window.first // self._mc.block_size,
            window.visible,
        )
        most = min(self._mc.geometry.head_nodes[1], (visible - self._tail_len) // 2)
        recent = window.known - 1 - (visible - most)
        recent += -recent % block  # the oldest recent token begins a block
        in_sight = torch.arange(recent, window.known - 1, device=shortlist.device)
        open_blocks = torch.arange(
            recent // block, (window.known - 1 - self._tail_len) // block, device=shortlist.device
        )
        shortlist = shortlist[shortlist + first < recent // block] + first
        blocks, tail = [open_blocks], self._stand_in(window)
        scores: list[Tensor] = []
        for part in shortlist.chunk(max(1, -(-shortlist.numel() // most))):
            gists = part.sort().values
            starts = torch.cat([gists * block, in_sight])
            lods = F.pad(torch.ones_like(gists), (0, in_sight.numel()))[None]
            row = self._scores(
                lods, starts[None], tail, seen_at=self._close_up(starts, gists.numel())
            )[0].float()
            if not scores:
                scores.append(
                    row[gists.numel() :][: open_blocks.numel() * block]
                    .unflatten(0, (-1, block))
                    .mean(dim=1)
                )
            blocks.append(gists)
            scores.append(row[: gists.numel()])
        return Heard(torch.cat(blocks).cpu().numpy(), torch.cat(scores).cpu().numpy())

    def _close_up(self, starts: Tensor, gists: int) -> Tensor | None:
        """Starts [1, M] as if the first `gists` of the blocks stood directly before the rest: a distance that LensNet knows.

        None where positions go by place in the context, which no distance changes.
        """
        if self._mc.position_scheme == "order":
            return None
        block = self._mc.block_size
        before = torch.arange(-gists, 0, device=starts.device) * block + starts[gists]
        return torch.cat([before - before[:1].clamp_max(0), starts[gists:]])[None]

    def _over(self, window: Window, heard: Heard) -> Tensor:
        """What was heard, as scores [1, n_1] of the window's blocks."""
        assert window.geometry is not None
        return heard.over(window.first // self._mc.block_size, window.geometry.head_nodes[1]).to(
            self._tree.device
        )

    def _best_heard(self, window: Window, heard: Heard, hidden: Tensor, count: int) -> Tensor:
        """Places in the window of at most `count` heard blocks of `hidden`: those that LensNet scores highest."""
        scores = (
            self._over(window, heard)[0].nan_to_num(-torch.inf).masked_fill(~hidden, -torch.inf)
        )
        best = scores.topk(min(count, scores.numel()))
        return best.indices[best.values > -torch.inf]

    def _surfaced(self, window: Window, blocks: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The plan of `blocks` [1, n_1] with those at the places `chosen` brought to LOD1."""
        assert window.geometry is not None
        opened = open_nodes(
            blocks,
            window.geometry,
            torch.zeros_like(blocks, dtype=torch.bool).index_fill(1, chosen, True),
        )
        length = window.geometry.seq_len - int(units_used(opened, window.geometry)) * (
            self._mc.block_size - 1
        )
        return plan_of_blocks(opened, window.geometry, length)

    def _row(self, values: Lods) -> Tensor:
        return torch.from_numpy(values)[None].to(self._tree.device)


def context_of(window: Window, lods: Tensor, starts: Tensor, heard: Heard | None = None) -> Context:
    """The context of a plan [1, W] of the window's geometry."""
    return Context(window, lods[0].cpu().numpy(), starts[0].cpu().numpy() + window.first, heard)
