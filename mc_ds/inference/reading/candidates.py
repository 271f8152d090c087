"""Candidates of focus in long histories: blocks that a search finds, LensNet rescores, and the
context that focus starts from shows.

Legend: n_1 head blocks of the window, K block size, M visible entries.
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
"""Best matching blocks of a search that LensNet rescores at a question."""


class Candidates:
    """The search for blocks in one tree."""

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
        """`at_most` candidates at a question, in histories longer than `beyond` tokens."""
        self._search, self._lens, self._tree, self._mc, self._phases = (
            search,
            lens,
            tree,
            mc,
            phases,
        )
        self.at_most, self._beyond = at_most, beyond

    def count(self, window: Window, even_1n: Tensor) -> int:
        """Return the candidates at a question; 0 where the even cover, block LODs [1, n_1], hides
        no block or leaves no room to open them.
        """
        geometry = window.geometry
        assert geometry is not None
        if window.known <= self._beyond or not bool((even_1n > 1).any()):
            return 0
        spare = geometry.max_units - geometry.units(window.length)
        # Half of what is to spare is left to open them.
        return min(self.at_most, spare // (2 * (geometry.max_lod - 1)))

    def matching(self, window: Window, hidden_n: Tensor, at_most: int) -> Tensor:
        """Return the places in the window of `at_most` blocks of `hidden`, bool [n_1], that match
        the visible tail best; the best first.
        """
        first = window.first // self._mc.block_size
        with self._phases("search"):
            tail = self._lens.tail_ids(window.known)
            index = self._tree.nets.token_index(self._tree.nets.embed(tail))
            matches = self._search.scores(index, first, first + hidden_n.numel()).masked_fill(
                ~hidden_n, -torch.inf
            )
            return matches.topk(min(at_most, int(hidden_n.sum()))).indices

    @torch.no_grad()
    def rescored(self, window: Window, shortlist: Tensor) -> Tensor:
        """Return LensNet's scores [1, n_1] of the blocks at the places `shortlist`, each in a
        context like those it was trained on; else NaN.

        As many at a time as a training history has, at LOD1, before the most recent tokens; blocks
        among these are scored at LOD0. (In a context of a million tokens nearly all entries are
        coarse, which LensNet never saw: its scores there mean little.)
        """
        assert window.geometry is not None
        block, first = self._mc.block_size, window.first // self._mc.block_size
        most = min(self._mc.geometry.head_nodes[1], (window.visible - self._lens.tail_len) // 2)
        recent = window.known - 1 - (window.visible - most)
        recent += -recent % block  # the oldest recent token begins a block
        in_sight = torch.arange(recent, window.known - 1, device=shortlist.device)
        open_blocks = torch.arange(
            recent // block,
            (window.known - 1 - self._lens.tail_len) // block,
            device=shortlist.device,
        )
        shortlist = shortlist[shortlist + first < recent // block] + first
        found = torch.full((1, window.geometry.head_nodes[1]), torch.nan, device=shortlist.device)
        for number, part in enumerate(shortlist.chunk(max(1, -(-shortlist.numel() // most)))):
            gists = part.sort().values
            starts = torch.cat([gists * block, in_sight])
            lods = F.pad(torch.ones_like(gists), (0, in_sight.numel()))[None]
            row = self._lens.scores(
                lods, starts[None], window.known, seen_at=self._close_up(starts, gists.numel())
            )[0].float()
            found[0, gists - first] = row[: gists.numel()]
            if number == 0:
                of_recent = row[gists.numel() :][: open_blocks.numel() * block]
                found[0, open_blocks - first] = of_recent.unflatten(0, (-1, block)).mean(dim=1)
        return found

    def forget(self, count: int) -> None:
        """The history was cut to `count` tokens."""
        self._search.forget(count // self._mc.block_size)

    def _close_up(self, starts: Tensor, gists: int) -> Tensor | None:
        """Return starts [1, M] as if the first `gists` of the blocks stood directly before the
        rest: a distance that LensNet knows.

        None where positions go by place in the context, which no distance changes.
        """
        if self._mc.position_scheme == "order":
            return None
        block = self._mc.block_size
        before = torch.arange(-gists, 0, device=starts.device) * block + starts[gists]
        return torch.cat([before - before[:1].clamp_max(0), starts[gists:]])[None]


def best_rescored(rescored_1n: Tensor, hidden_n: Tensor, count: int) -> Tensor:
    """Return the places of at most `count` rescored blocks of `hidden`, bool [n_1]: those with the
    highest scores.
    """
    scores = rescored_1n[0].nan_to_num(-torch.inf).masked_fill(~hidden_n, -torch.inf)
    best = scores.topk(min(count, scores.numel()))
    return best.indices[best.values > -torch.inf]


def surfaced(blocks_1n: Tensor, geometry: Geometry, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plan [1, W] of block LODs with the blocks at the places `chosen` brought to
    LOD1.
    """
    mask = torch.zeros_like(blocks_1n, dtype=torch.bool).index_fill(1, chosen, True)
    opened = open_nodes(blocks_1n, geometry, mask)
    removed = int(units_used(opened, geometry)) * (geometry.block_size - 1)
    return plan_of_blocks(opened, geometry, geometry.seq_len - removed)
