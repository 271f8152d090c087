"""Run LensNet over the entries of a tree.

Legend: R rows, M visible entries, D width, I width of index vectors, Q visible tail tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.focus.controller import MCController
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.scorer import Matched
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.lensnet import LensNet
from mc_ds.model.lensnet.matches import ABSENT
from mc_ds.model.lensnet.meaning import REACH

MATCHED_BLOCKS = 4096
"""Greatest number of adjacent blocks whose matches are computed together."""


class TreeLens:
    """Scores contexts of a tree with LensNet. Its visible tail may be replaced by other tokens."""

    def __init__(
        self,
        lensnet: LensNet,
        controller: MCController,
        tree: MegaContextTree,
        phases: Phases,
        *,
        tail: Tensor | None,
        blind: bool,
    ) -> None:
        """The last Q tokens of `tail` replace the visible tail, or for scores of n tokens earlier
        the Q tokens before its last n. With `blind` and no `tail`, the Q tokens that end in the
        middle of the history replace it.
        """
        self._controller, self._tree, self._phases = controller, tree, phases
        self.has_index, self.tail_len = lensnet.index is not None, lensnet.tail_len
        self.has_matches = lensnet.matches is not None
        self._given_tail = tail
        self._blind = blind

    def tail_ids(self, known: int, earlier: int = 0) -> Tensor:
        """Return the tokens [Q] that LensNet reads as the visible tail of a history of `known`
        tokens, which had `earlier` more.
        """
        replacement = self._replacement(known, earlier)
        if replacement is not None:
            return replacement
        return self._tree.tokens(known - 1 - self.tail_len, known - 1)

    @torch.no_grad()
    def scores(
        self,
        lods_RM: Tensor,
        starts_RM: Tensor,
        known: int,
        *,
        earlier: int = 0,
        positions_from: Tensor | None = None,
    ) -> Tensor:
        """Return scores [R, M] of contexts of one history, on the tree's device. The last entries
        of each row are the visible tail of the first `known` tokens; the history had `earlier`
        more, which counts for a tail that replaces it. LensNet's positions follow
        from `positions_from` [R, M], by default from `starts_RM`. Plans are preferably on the host.
        """
        lods, starts = lods_RM.cpu(), starts_RM.cpu()
        with self._phases("tree"):
            entries, index = (
                rows.unflatten(0, lods.shape)
                for rows in self._tree.indexed_entries(lods.flatten(), starts.flatten())
            )
            tail = self._replacement(known, earlier)
            if tail is not None:
                embedded = self._tree.nets.embed(tail)
                tails = embedded, self._tree.nets.token_index(embedded)
                entries, index = (
                    torch.cat([rows[:, : -self.tail_len], new.expand(len(rows), -1, -1)], dim=1)
                    for rows, new in zip((entries, index), tails, strict=True)
                )
        with self._phases("lens"):
            return self._controller.score(
                entries,
                lods,
                starts if positions_from is None else positions_from,
                index if self.has_index else None,
                *(self.matched(lods, starts, known, earlier) or ()),
            )

    def matched(
        self, lods_RM: Tensor, starts_RM: Tensor, known: int, earlier: int = 0
    ) -> Matched | None:
        """Return the blocks that LensNet matches with the tail, for a plan on the host; None
        if it matches none.

        They are the blocks from the first entry's to the tail, or if those are too many, the blocks
        of the entries alone.
        """
        if not self.has_matches:
            return None
        block = self._tree.shape.block_size
        first = int(starts_RM[:, 0].amin()) // block
        end = (known - 1 - self.tail_len) // block
        number_RM = starts_RM // block
        if end - first <= MATCHED_BLOCKS:
            tokens, place_RM = self._tokens_between(first, end), number_RM - first
        else:
            within = (lods_RM <= 1) & (number_RM < end)
            blocks = number_RM[within].unique()
            tokens, place_RM = self._tokens_of(blocks), torch.searchsorted(blocks, number_RM)
            place_RM = torch.where(within, place_RM, blocks.numel())
        return Matched(tokens, self.tail_ids(known, earlier)[-REACH:], place_RM)

    def _tokens_between(self, first: int, end: int) -> Tensor:
        """Return the tokens of the blocks [first, end), each after the block before, [m, 2 K]."""
        block = self._tree.shape.block_size
        tokens = self._tree.tokens(max(0, first - 1) * block, end * block)
        before = F.pad(tokens, (0 if first else block, 0), value=ABSENT)
        return before.unfold(0, 2 * block, block)

    def _tokens_of(self, blocks_m: Tensor) -> Tensor:
        """Return the tokens of blocks, each after the block before it, [m, 2 K]."""
        block = self._tree.shape.block_size
        places = (blocks_m[:, None] - 1) * block + torch.arange(2 * block)
        tokens = self._tree.tokens_at(places.clamp_min(0).flatten()).view_as(places)
        return tokens.masked_fill((places < 0).to(tokens.device), ABSENT)

    def _replacement(self, known: int, earlier: int) -> Tensor | None:
        """Return the tokens [Q] that replace the visible tail; None if it is not replaced."""
        if (given := self._given_tail) is not None:
            end = max(self.tail_len, len(given) - earlier)
            return given[end - self.tail_len : end]
        if not self._blind:
            return None
        end = max(self.tail_len, (known - 1) // 2)
        return self._tree.tokens(end - self.tail_len, end)
