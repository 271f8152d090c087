"""Run LensNet over the entries of a tree.

Legend: R rows, M visible entries, D width, I width of index vectors, Q visible tail tokens.
"""

import torch
from torch import Tensor, nn

from mc_ds.focus.controller import MCController
from mc_ds.inference.phases import Phases
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.lensnet import LensNet
from mc_ds.model.lensnet.matches import ABSENT, match_features

MATCHED_BLOCKS = 4096
"""Greatest number of adjacent blocks whose lexical matches are computed together."""


class LensInput(nn.Module):
    """LensNet as a module that takes index vectors from a tree as input instead of computing
    them.
    """

    def __init__(self, lensnet: LensNet) -> None:
        super().__init__()
        self.lensnet = lensnet

    def forward(
        self,
        entries_RMD: Tensor,
        lods_RM: Tensor,
        starts_RM: Tensor,
        index_RMI: Tensor | None,
        matches_RMI: Tensor | None = None,
    ) -> Tensor:
        """Return LensNet's scores [R, M]."""
        return self.lensnet.score(entries_RMD, lods_RM, starts_RM, index_RMI, matches_RMI)


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
        """The last Q tokens of `tail` [>= Q] replace the visible tail. With `blind` and no `tail`,
        the Q tokens that end in the middle of the history replace it.
        """
        self._controller, self._tree, self._phases = controller, tree, phases
        self.has_index, self.tail_len = lensnet.index is not None, lensnet.tail_len
        self._lensnet = lensnet
        self._given_tail = tail[-self.tail_len :] if tail is not None else None
        self._blind = blind

    def tail_ids(self, known: int) -> Tensor:
        """Return the tokens [Q] that LensNet reads as the visible tail of a history of `known`
        tokens.
        """
        replacement = self._replacement(known)
        if replacement is not None:
            return replacement
        return self._tree.tokens(known - 1 - self.tail_len, known - 1)

    def scores(
        self,
        lods_RM: Tensor,
        starts_RM: Tensor,
        known: int,
        *,
        positions_from: Tensor | None = None,
    ) -> Tensor:
        """Return scores [R, M] of contexts of one history. The last entries of each row are the
        visible tail of the first `known` tokens. LensNet's positions follow from `positions_from`
        [R, M], by default from `starts_RM`.
        """
        with self._phases("tree"):
            on_host = lods_RM.cpu().flatten(), starts_RM.cpu().flatten()
            entries, index = (
                rows.unflatten(0, lods_RM.shape)
                for rows in (self._tree.entries(*on_host), self._tree.entry_index(*on_host))
            )
            tail = self._replacement(known)
            if tail is not None:
                embedded = self._tree.nets.embed(tail)
                tails = embedded, self._tree.nets.token_index(embedded)
                entries, index = (
                    torch.cat([rows[:, : -self.tail_len], new.expand(len(rows), -1, -1)], dim=1)
                    for rows, new in zip((entries, index), tails, strict=True)
                )
        with self._phases("lens"):
            matches = self._matches(lods_RM, starts_RM, known)
            return self._controller.score(
                entries,
                lods_RM,
                starts_RM if positions_from is None else positions_from,
                index if self.has_index else None,
                *(() if matches is None else (matches,)),
            )

    @torch.no_grad()
    def _matches(self, lods_RM: Tensor, starts_RM: Tensor, known: int) -> Tensor | None:
        """Return the vectors of the entries' lexical matches, [R, M, I]; None if LensNet has none.

        They are computed for the blocks from the first entry's to the tail, or if those are too
        many, for the blocks of the entries alone.
        """
        if self._lensnet.matches is None:
            return None
        block = self._tree.shape.block_size
        first = int(starts_RM[:, 0].amin()) // block
        end = (known - 1 - self.tail_len) // block
        number_RM = starts_RM // block
        if end - first <= MATCHED_BLOCKS:
            blocks, place_RM = torch.arange(first, end, device=starts_RM.device), number_RM - first
        else:
            within = (lods_RM <= 1) & (number_RM < end)
            blocks = number_RM[within].unique()
            place_RM = torch.searchsorted(blocks, number_RM)
            place_RM = torch.where(within, place_RM, blocks.numel())
        features = match_features(self._tokens_of(blocks)[None], self.tail_ids(known)[None])
        return self._lensnet.spread_matches(features, lods_RM, place_RM)

    def _tokens_of(self, blocks_m: Tensor) -> Tensor:
        """Return the tokens of blocks and of the block before each, [m, 2 K]."""
        block = self._tree.shape.block_size
        places = (blocks_m[:, None] - 1) * block + torch.arange(2 * block, device=blocks_m.device)
        tokens = self._tree.tokens_at(places.clamp_min(0).flatten()).view_as(places)
        return torch.where(places < 0, ABSENT, tokens)

    def _replacement(self, known: int) -> Tensor | None:
        """Return the tokens [Q] that replace the visible tail; None if it is not replaced."""
        if self._given_tail is not None or not self._blind:
            return self._given_tail
        end = max(self.tail_len, (known - 1) // 2)
        return self._tree.tokens(end - self.tail_len, end)
