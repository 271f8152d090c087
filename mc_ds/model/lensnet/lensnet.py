"""LensNet: scores every visible working-context entry. Higher means "more detail here"; only
differences within a row have a meaning.

Projected entries with LOD and tail embeddings and index vectors pass through ask layers and
transformer blocks with Gaussian RoPE, then a tanh head initialised to zero. The blocks are not
causal, since entries of the far past must see the question in the tail. LensNet reads only the
first M entries, in training W - h: the horizon does not exist yet at inference. All its input is
detached, so its loss never reaches the backbone.

Legend: B sequences, T tokens, G rows per sequence, R = B*G rows, W entries, M visible ones of
them, D backbone width, I LensNet width, P tree nodes. Source: docs/lensnet-pairwise-training.md,
"LensNet".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_ds.config import MCConfig
from mc_ds.geometry import node_index
from mc_ds.model.backbone.layers import EncoderBlock
from mc_ds.model.gather import gather_entries
from mc_ds.model.lensnet import matches as words
from mc_ds.model.lensnet import meaning
from mc_ds.model.lensnet.ask import AskLayer
from mc_ds.model.lensnet.index import IndexNet
from mc_ds.model.lensnet.matches import Matches, match_features, with_block_before
from mc_ds.model.lensnet.meaning import Compared, MeaningFeatures
from mc_ds.model.positions import rotary_tables

ROUNDING = 1e-4
"""A spread of early scores below this fraction of the largest is treated as rounding error: all
blocks are then equally good.
"""


class EarlyHead(nn.Module):
    """Scores entries before the layers that attend to opened blocks, to weight these blocks.
    Initialised to zero. Its result is also added to the final score.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_RMI: Tensor) -> Tensor:
        """Return scores, [R, M, I] -> [R, M] float32."""
        return part_of_score(x_RMI, self.norm, self.up, self.down)


def part_of_score(x_RMI: Tensor, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """Return one head's contribution to the scores before tanh, float32 [R, M]."""
    score: Tensor = down(F.gelu(up(norm(x_RMI)))).squeeze(-1)
    return score.float()


class LensNet(nn.Module):
    """Scores the visible entries of a working context, in [-1, 1]."""

    ROPE_BASE = 10_000.0

    def __init__(self, config: MCConfig, *, dim: int) -> None:
        super().__init__()
        width = config.lens_dim
        self.config = config
        self.geometry = config.geometry
        self.tail_len = config.recent_tokens - config.horizon_tokens
        self.index = IndexNet(dim=dim, lens_dim=width) if config.lens_index else None
        by_meaning = config.lens_matches == "meaning"
        features = len(words.NAMES) + by_meaning * len(meaning.NAMES)
        self.matches = Matches(width, features) if config.lens_matches != "none" else None
        self.meaning = MeaningFeatures(width) if by_meaning else None
        self.project = nn.Linear(dim, width, bias=False)
        self.lod_embedding = nn.Embedding(config.max_lod + 1, width)
        self.tail_embedding = nn.Parameter(
            nn.init.normal_(self.lod_embedding.weight.new_empty(width), std=0.02)
        )
        self.asks = nn.ModuleList(
            AskLayer(
                dim=width,
                num_read=self.tail_len,
                tied=config.lens_ask == "tied",
                relevance=self._reads_open(layer),
            )
            for layer in range(config.lens_layers if config.lens_ask != "none" else 0)
        )
        std = width**-0.5 / 3**0.5
        self.blocks = nn.ModuleList(
            EncoderBlock(width, config.lens_heads, std=std, out_std=std)
            for _ in range(config.lens_layers)
        )
        self.head_norm = nn.RMSNorm(width)
        self.head_up = nn.Linear(width, width)
        # No bias: a constant in all scores has no effect, and AdamW would let it drift.
        self.head_down = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head_down.weight)
        self.early = nn.ModuleList(
            EarlyHead(width) for layer in range(config.lens_layers) if self._reads_open(layer)
        )
        self.graphed: Callable[..., Tensor] | None = None
        """Replacement of `row_scores` in training, such as its CUDA graph; None: not replaced."""

    def forward(
        self,
        entries_RMD: Tensor,
        lods_RW: Tensor,
        starts_RW: Tensor,
        lod0_BTD: Tensor,
        tokens_BT: Tensor | None = None,
    ) -> Tensor:
        """Return scores, float32 [R, W], zero for the entries behind the M given ones, which are
        the horizon, and the last tokens of the tail if these are hidden. Rows of a sequence are
        adjacent.

        `tokens_BT` are needed for matches; those behind the visible entries are ignored.
        """
        trains = self.training and torch.is_grad_enabled()
        function = self.graphed if self.graphed is not None and trains else self.row_scores
        given = (tokens_BT,) if tokens_BT is not None else ()
        return function(entries_RMD, lods_RW, starts_RW, lod0_BTD, *given)

    def row_scores(
        self,
        entries_RMD: Tensor,
        lods_RW: Tensor,
        starts_RW: Tensor,
        lod0_BTD: Tensor,
        tokens_BT: Tensor | None = None,
    ) -> Tensor:
        """Compute `forward` without a replacement: float32 [R, W], zero for hidden entries."""
        visible = entries_RMD.size(1)
        hidden = lods_RW.size(1) - visible  # all of them tokens
        lods, starts = lods_RW[:, :visible], starts_RW[:, :visible]
        table = index = matches = None
        if self.index is not None:
            table = self.index_table(lod0_BTD)
            index = self.entry_index(table, lods, starts)
        if self.matches is not None:
            assert tokens_BT is not None, "matches need the tokens"
            matches = self.entry_matches(tokens_BT, table, lods, starts, hidden)
        scores = self.score(entries_RMD, lods, starts, index, matches)
        return F.pad(scores, (0, lods_RW.size(1) - visible))

    def has_learnt(self) -> bool:
        """Return whether the output layer has left its zero initialisation. Synchronises with the
        device.
        """
        return bool(self.head_down.weight.any())

    def _reads_open(self, layer: int) -> bool:
        """Return whether ask layer `layer` also attends to opened blocks. The first layer attends
        to the tail alone.
        """
        return self.config.lens_ask_reach == "open" and layer > 0

    def index_table(self, lod0_BTD: Tensor) -> Tensor:
        """Return the index vectors [B, P, I] of the whole tree, computed once per sequence."""
        assert self.index is not None
        block_size, max_lod = self.config.block_size, self.config.max_lod
        table: Tensor = self.index(lod0_BTD, block_size=block_size, max_lod=max_lod)
        return table

    def entry_index(self, index_BPI: Tensor, lods_RM: Tensor, starts_RM: Tensor) -> Tensor:
        """Return the index vectors [R, M, I] of the visible entries, given those of all nodes."""
        return gather_entries(index_BPI, node_index(lods_RM, starts_RM, self.geometry))

    def entry_matches(
        self,
        tokens_BT: Tensor,
        index_BPI: Tensor | None,
        lods_RM: Tensor,
        starts_RM: Tensor,
        hidden: int,
    ) -> Tensor:
        """Return the vectors [R, M, I] of the matches of the visible entries. `index_BPI`: index
        vectors of all nodes, tokens first; needed for matches by meaning. `hidden`: number of last
        tokens that are not visible.
        """
        block_size = self.config.block_size
        visible = self.geometry.seq_len - hidden
        tail = slice(visible - self.tail_len, visible)
        count = tail.start // block_size
        blocks = with_block_before(tokens_BT, block_size, count)
        vectors = None
        if index_BPI is not None:
            of_blocks = index_BPI[:, : count * block_size]
            vectors = of_blocks.unflatten(1, (-1, block_size)), index_BPI[:, tail]
        features = self.block_features(blocks, tokens_BT[:, tail], vectors)
        return self.spread_matches(features, lods_RM, starts_RM // block_size)

    def block_features(
        self,
        blocks_BmX: Tensor,
        tail_BQ: Tensor,
        vectors: tuple[Tensor, Tensor] | None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Return the features [B, m, F] by which blocks, each given after the block before it,
        match a tail.

        `vectors`: index vectors of the tokens of the blocks [B, m, K, I] and of the tail [B, Q, I];
        needed for matches by meaning. `count`: see `match_features`.
        """
        features = match_features(blocks_BmX, tail_BQ, count)
        if self.meaning is None:
            return features
        assert vectors is not None, "matches by meaning need index vectors"
        own = blocks_BmX[:, :, blocks_BmX.size(2) // 2 :]
        compared = Compared(own, vectors[0]), Compared(tail_BQ, vectors[1])
        return torch.cat([features, self.meaning(*compared, count)], dim=-1)

    def spread_matches(
        self,
        features_BmF: Tensor,
        lods_RM: Tensor,
        block_RM: Tensor,
        count: Tensor | None = None,
    ) -> Tensor:
        """Return the vectors [R, M, I] of entries in the blocks with the indices `block_RM` among
        the m given ones; 0 for entries outside of these and above LOD1. `count`: see
        `match_features`.
        """
        assert self.matches is not None
        vectors = F.pad(self.matches(features_BmF, count), (0, 0, 0, 1))
        outside = features_BmF.size(1)
        last = outside if count is None else count
        inside = (lods_RM <= 1) & (block_RM >= 0) & (block_RM < last)
        return gather_entries(vectors, torch.where(inside, block_RM, outside))

    def score(
        self,
        entries_RMD: Tensor,
        lods_RM: Tensor,
        starts_RM: Tensor,
        index_RMI: Tensor | None,
        matches_RMI: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return scores of visible entries, float32 [R, M], given their index vectors (None without
        an index) and vectors of matches (None without matches).

        If given, `padding` ([1] int64) is the number of leading entries that are padding: gists,
        from which no other score depends. Their own scores mean nothing.
        """
        normed = F.rms_norm(entries_RMD.float(), (entries_RMD.size(-1),))
        x = self.project(normed) + self.lod_embedding(lods_RM.long())
        if index_RMI is not None:
            index_RMI = F.rms_norm(index_RMI, (index_RMI.size(-1),))
            x = x + index_RMI
        if matches_RMI is not None:
            x = x + matches_RMI
        # Mark the tail, the last visible entries.
        head_len = x.size(1) - self.tail_len
        x = x + F.pad(self.tail_embedding.expand(self.tail_len, -1), (0, 0, head_len, 0))
        index_tail = None if index_RMI is None else index_RMI[:, head_len:]
        cos, sin = rotary_tables(
            lods_RM,
            starts_RM,
            block_size=self.config.block_size,
            head_dim=self.config.lens_dim // self.config.lens_heads,
            base=self.ROPE_BASE,
            scheme=self.config.position_scheme,
        )
        # Ask layer and transformer block in turn; early heads weight the opened blocks.
        blocks = opened_blocks(lods_RM, starts_RM, head_len, self.config.block_size)
        early_RM = x.new_zeros(x.shape[:2], dtype=torch.float32)
        mask = None if padding is None else _hiding(x, padding)
        for layer, block in enumerate(self.blocks):
            if self.asks and self._reads_open(layer):
                early_RM = early_RM + self.early[layer - 1](x)
                stands = standing(early_RM.detach(), blocks, lods_RM)
                x = self.asks[layer](x, x, index_RMI, index_RMI, stands)
            elif self.asks:
                x = self.asks[layer](x, x[:, head_len:], index_RMI, index_tail)
            x = block(x, cos, sin, mask)
        score_RM = early_RM + part_of_score(x, self.head_norm, self.head_up, self.head_down)
        return (
            shared(score_RM, blocks) if self.config.lens_block_scores == "shared" else score_RM
        ).tanh()


def _hiding(x_RMI: Tensor, padding: Tensor) -> Tensor:
    """Return a mask [1, 1, 1, M], which is added to logits, that hides the first entries."""
    places = torch.arange(x_RMI.size(1), device=x_RMI.device)
    return x_RMI.new_zeros(1, 1, 1, places.numel()).masked_fill(places < padding, -torch.inf)


class OpenedBlocks(NamedTuple):
    """Which entries of a working context belong to the same opened block."""

    first: Tensor
    """[R, M] place of the first entry of the entry's block, if the block is whole."""
    is_whole: Tensor
    """[R, M] whether the entry is a token of a head block of which all tokens are entries."""
    block_size: int
    """K"""


def opened_blocks(
    lods_RM: Tensor, starts_RM: Tensor, head_len: int, block_size: int
) -> OpenedBlocks:
    """Return the opened blocks among the first `head_len` entries. Entries are in time order, so
    the tokens of a block are adjacent.
    """
    is_token = lods_RM == 0
    in_head = is_token & (torch.arange(is_token.size(1), device=is_token.device) < head_len)
    # Gists and tokens at multiples of K begin a block: counting these numbers the blocks.
    block = (~is_token | (starts_RM % block_size == 0)).long().cumsum(1)
    # Number of head tokens in the block of each entry.
    size = (
        block.new_zeros(len(block), block.size(1) + 1)
        .scatter_add(1, block, in_head.long())
        .gather(1, block)
    )
    offset = torch.where(is_token, starts_RM % block_size, 0)
    first = (torch.arange(offset.size(1), device=offset.device) - offset).clamp_min(0)
    return OpenedBlocks(first, in_head & (size == block_size), block_size)


def shared(score_RM: Tensor, blocks: OpenedBlocks) -> Tensor:
    """Return scores in which every token of an opened block has the largest score of its block, [R,
    M]. Other entries keep theirs. By `max`, not `amax`, the gradient goes to a single one of equal
    tokens.
    """
    # Largest score of the K entries that begin with each entry, then back to the block's tokens.
    following = F.pad(score_RM, (0, blocks.block_size - 1), value=-torch.inf)
    best = following.unfold(1, blocks.block_size, 1).max(2).values
    of_token = gather_entries(best[..., None], blocks.first)[..., 0]
    return torch.where(blocks.is_whole, of_token, score_RM)


def standing(score_RM: Tensor, blocks: OpenedBlocks, lods_RM: Tensor) -> Tensor:
    """Return how far each opened block is behind the best one of its row, [R, M].

    Blocks are compared by their best token, in standard deviations over the opened tokens of the
    row: 0 for the best block, negative for others, -inf for gists. Tokens outside opened blocks,
    mostly those of the tail, have untrained scores and get the mean.
    """
    opened, best = blocks.is_whole, shared(score_RM, blocks)
    # Standardise over the opened tokens of each row.
    count = opened.sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(opened, best, 0).sum(1, keepdim=True) / count
    centred = torch.where(opened, best - mean, 0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    rounding = ROUNDING * torch.where(opened, best.abs(), 0).amax(1, keepdim=True) + ROUNDING**2
    ahead = centred / torch.maximum(spread, rounding)
    return (ahead - ahead.amax(1, keepdim=True)).masked_fill(lods_RM > 0, -torch.inf)
