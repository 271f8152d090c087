"""Candidates in long histories: a search finds matching blocks, LensNet rescores them, and the best
are put at LOD1 in the context that focus starts from.

Legend: R rows, n_1 head blocks of the window, K block size, M visible entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.focus import open_nodes, plan_of_blocks, units_used
from mc_ds.geometry import Geometry
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.lens import TreeLens
from mc_ds.inference.reading.search import BlockSearch
from mc_ds.inference.reading.window import Window
from mc_ds.inference.tree.tree import MegaContextTree

SHORTLIST = 4096
"""Number of best matching blocks that LensNet rescores at a refocus from the history alone."""
LARGEST_CALL = 2**26
"""Largest number of elements per tensor when several contexts are rescored in one call of LensNet;
a single context may have more.
"""


class Candidates:
    """Finds and rescores the candidate blocks of one tree."""

    def __init__(
        self,
        search: BlockSearch,
        lens: TreeLens,
        tree: MegaContextTree,
        mc: MCConfig,
        phases: Phases,
        *,
        at_most: int,
        beyond: int,
    ) -> None:
        """`at_most` is the number of candidates at a refocus from the history alone. Histories of
        up to `beyond` tokens have none.
        """
        self._search, self._lens, self._tree, self._mc, self._phases = (
            search,
            lens,
            tree,
            mc,
            phases,
        )
        self.at_most, self.beyond = at_most, beyond

    def count(self, window: Window, even_1n: Tensor) -> int:
        """Return the number of candidates for a refocus from the history alone.

        It is 0 if the even cover (block LODs [1, n_1]) has every block at LOD1 or finer, or has no
        room to open candidates.
        """
        geometry = window.geometry
        assert geometry is not None
        if window.known <= self.beyond or not bool((even_1n > 1).any()):
            return 0
        spare = geometry.max_units - geometry.units(window.length)
        # Half of the spare units expand candidates to LOD1, half are left to open them.
        return min(self.at_most, spare // (2 * (geometry.max_lod - 1)))

    def matching(self, window: Window, hidden_n: Tensor, at_most: int) -> Tensor:
        """Return the indices in the window of the `at_most` blocks of `hidden_n` (bool [n_1]) that
        match the visible tail best, best first, on the device of `hidden_n`.
        """
        first = window.first // self._mc.block_size
        with self._phases("search"):
            tail = self._lens.tail_ids(window.known)
            index = self._tree.nets.token_index(self._tree.nets.embed(tail))
            matches = self._search.scores(index, first, first + hidden_n.numel())
            matches = matches.to(hidden_n.device).masked_fill(~hidden_n, -torch.inf)
            return matches.topk(min(at_most, int(hidden_n.sum()))).indices

    @torch.no_grad()
    def rescored(self, window: Window, shortlist: Tensor) -> Tensor:
        """Return LensNet's scores [1, n_1] of the blocks with the indices `shortlist` and of recent
        blocks, NaN for all others, on the device of `shortlist`.

        Blocks are scored in contexts like those of training: as many gists at LOD1 as a training
        history has, followed by the most recent tokens. Recent blocks are scored at LOD0. In the
        actual context of a million tokens nearly all entries are coarser than any that LensNet saw
        in training, so its scores there mean little.
        """
        assert window.geometry is not None
        block, first = self._mc.block_size, window.first // self._mc.block_size
        # Up to `most` gists, then the tokens from `recent` on.
        most = min(self._mc.geometry.head_nodes[1], (window.visible - self._lens.tail_len) // 2)
        recent = window.known - 1 - (window.visible - most)
        recent += -recent % block  # the oldest recent token begins a block
        recent_tokens = torch.arange(recent, window.known - 1, device=shortlist.device)
        # Complete blocks among the recent tokens, up to the tail.
        open_blocks = torch.arange(
            recent // block,
            (window.known - 1 - self._lens.tail_len) // block,
            device=shortlist.device,
        )
        shortlist = shortlist[shortlist + first < recent // block] + first
        found = torch.full((1, window.geometry.head_nodes[1]), torch.nan, device=shortlist.device)
        for number, gists in enumerate(self._contexts_of(shortlist, most, recent_tokens.numel())):
            rows, count = gists.shape
            starts = torch.cat([gists * block, recent_tokens.expand(rows, -1)], dim=1)
            lods = F.pad(torch.ones_like(gists), (0, recent_tokens.numel()))
            scores = self._lens.scores(
                lods, starts, window.known, positions_from=self._compacted(starts, count)
            ).to(found)
            found[0, gists - first] = scores[:, :count]
            if number == 0:
                of_recent = scores[0, count:][: open_blocks.numel() * block]
                found[0, open_blocks - first] = of_recent.unflatten(0, (-1, block)).mean(dim=1)
        return found

    def _contexts_of(self, shortlist: Tensor, most: int, others: int) -> list[Tensor]:
        """Distribute blocks evenly over contexts of up to `most` of them, in time order, and
        contexts of equal size over calls of LensNet: [rows, blocks] each.

        A context has `others` more entries, which limits the contexts of a call. Without blocks
        there is one empty context.
        """
        count = shortlist.numel()
        size = max(1, -(-count // max(1, -(-count // most))))
        whole = count - count % size
        entries = size + others
        at_once = max(1, LARGEST_CALL // (entries * max(entries, self._tree.shape.dim)))
        calls = [*shortlist[:whole].view(-1, size).split(at_once)] if whole else []
        if whole < count or not count:
            calls.append(shortlist[None, whole:])
        return [gists.sort(dim=1).values for gists in calls]

    def forget(self, count: int) -> None:
        """Discard results that depend on tokens after the first `count`."""
        self._search.forget(count // self._mc.block_size)

    def _compacted(self, starts_RM: Tensor, gists: int) -> Tensor | None:
        """Return starts [R, M] shifted so that the first `gists` entries directly precede the
        others, at distances that occur in training.

        None for position scheme "order", which uses no distances.
        """
        if self._mc.position_scheme == "order":
            return None
        distances = torch.arange(-gists, 0, device=starts_RM.device) * self._mc.block_size
        before = starts_RM[:, gists, None] + distances
        return torch.cat([before - before[:, :1].clamp_max(0), starts_RM[:, gists:]], dim=1)


def best_rescored(rescored_1n: Tensor, hidden_n: Tensor, count: int) -> Tensor:
    """Return the indices of up to `count` blocks of `hidden_n` (bool [n_1]): the rescored blocks
    with the highest scores.
    """
    scores = rescored_1n[0].nan_to_num(-torch.inf).masked_fill(~hidden_n, -torch.inf)
    best = scores.topk(min(count, scores.numel()))
    return best.indices[best.values > -torch.inf]


def with_at_lod1(blocks_1n: Tensor, geometry: Geometry, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plan [1, W] of `blocks_1n` after the blocks with the indices `chosen` are expanded
    to LOD1.
    """
    mask = torch.zeros_like(blocks_1n, dtype=torch.bool).index_fill(1, chosen, True)
    opened = open_nodes(blocks_1n, geometry, mask)
    removed = int(units_used(opened, geometry)) * (geometry.block_size - 1)
    return plan_of_blocks(opened, geometry, geometry.seq_len - removed)
