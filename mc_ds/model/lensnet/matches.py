"""Lexical matches: how the words of a block answer to the last words of the visible tail.

Pooled index vectors say what a block is about. What helps a language model next is often narrower:
the place where the text went on after the same words before, or a rare word that was just used.
These features say that, from token ids alone. Which of them are worth something, LensNet learns.

For each block and the last words of the tail:

* `bm25`: BM25 with the last 4, 16 and 48 tokens as queries (K1 of saturation; blocks have equal
  lengths, so lengths need no normalisation);
* `ngram`: the summed rarity of the 2- and 3-grams that the block shares with the last 16 tokens;
* `rarest`: the rarity of the rarest of the last 16 tokens that the block holds;
* `suffix`: the length of the longest end of the tail that precedes a token of the block;
* `before`: BM25 with the last 16 tokens, and 3-grams, of the block before; a 3-gram that begins
  even earlier is not seen.

Legend: B sequences, m blocks, K block size, X = 2 K tokens of a block and the block before it, Q
last tokens of the tail, F features. Source: docs/experiments/block_gains.md, K1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = (4, 16, 48)
"""Numbers of last tokens that are BM25's queries."""
NGRAMS = (2, 3)
RECENT = 16
"""Number of last tokens whose n-grams and rare tokens are searched."""
SUFFIX = 12
"""Greatest length of a suffix."""
SATURATION = 1.2
"""BM25's k1."""
ABSENT = -1
"""Id of tokens before the beginning of the history. It matches nothing."""
NAMES = (
    *(f"bm25_{n}" for n in QUERIES),
    *(f"ngram_{n}" for n in NGRAMS),
    "rarest",
    "suffix",
    "before_bm25",
    "before_ngram",
)


class Matches(nn.Module):
    """Embeds the features of every block, as they are and relative to their mean over blocks."""

    def __init__(self, width: int, features: int = len(NAMES)) -> None:
        super().__init__()
        self.up = nn.Linear(2 * features, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, features_BmF: Tensor, count: Tensor | None = None) -> Tensor:
        """Return vectors of the blocks, [B, m, F] -> [B, m, width]. `count`: see `match_features`;
        the vectors of padding mean nothing.
        """
        total = features_BmF.sum(dim=1, keepdim=True)  # the features of padding are 0
        centred = features_BmF - total / number_of(features_BmF, count)
        result: Tensor = self.down(F.gelu(self.up(torch.cat([features_BmF, centred], dim=-1))))
        return result


def with_block_before(tokens_BV: Tensor, block_size: int, blocks: int) -> Tensor:
    """Return the tokens of the first `blocks` blocks, each after those of the block before it, [B,
    m, X]; ABSENT before the first.
    """
    own = tokens_BV[:, : blocks * block_size].unflatten(1, (blocks, block_size))
    before = F.pad(own[:, :-1], (0, 0, 1, 0), value=ABSENT)
    return torch.cat([before, own], dim=2)


@torch.no_grad()
def match_features(blocks_BmX: Tensor, tail_BQ: Tensor, count: Tensor | None = None) -> Tensor:
    """Return the features NAMES of blocks, each given with the block before it, for the last tokens
    of a tail: float32 [B, m, F], log(1 + x) of each.

    Reads at most the last 48 tokens of the tail. Rarity is counted over the m blocks, or over the
    first `count` ([1] int64) of them, if the others are padding, all of it ABSENT.
    """
    half = blocks_BmX.size(2) // 2
    query = tail_BQ[:, -max(QUERIES) :]
    recent = min(RECENT, query.size(1))
    same = blocks_BmX[..., None] == query[:, None, None]  # [B, m, X, Q]
    again = _occurs_again(query[:, None, :] == query[:, :, None])
    counts = torch.stack([same[:, :, half:].sum(2), same[:, :, :half].sum(2)]).float()
    holding = counts[0] > 0
    number = number_of(holding, count)
    rarity = _rarity(holding, number).masked_fill(again[:, None], 0)
    saturated = rarity * counts * (SATURATION + 1) / (counts + SATURATION)
    bm25 = [saturated[..., -n:].sum(-1) for n in QUERIES]
    grams = [_shared_ngrams(same, query, n, recent, number) for n in NGRAMS]
    features = [
        *(own for own, _ in bm25),
        *(own for own, _ in grams),
        (rarity * holding)[..., -recent:].amax(-1),
        _suffix(same, half),
        bm25[QUERIES.index(RECENT)][1],
        grams[-1][1],
    ]
    return torch.stack(features, dim=-1).log1p()


def _occurs_again(equal_BQQ: Tensor) -> Tensor:
    """Return which elements of a query occur again behind them, bool [B, Q]."""
    return equal_BQQ.triu(1).any(-1)


def number_of(of_blocks: Tensor, count: Tensor | None) -> Tensor | int:
    """Return the number of blocks in [B, m, ..] that are not padding."""
    return of_blocks.size(1) if count is None else count


def _rarity(holding_BmQ: Tensor, blocks: Tensor | int) -> Tensor:
    """Return BM25's inverse document frequency of what each block holds, float32 [B, 1, Q]."""
    number = holding_BmQ.sum(1, keepdim=True).float()
    return (1 + (blocks - number + 0.5) / (number + 0.5)).log()


def _shared_ngrams(
    same_BmXQ: Tensor, query_BQ: Tensor, n: int, recent: int, blocks: Tensor | int
) -> Tensor:
    """Return the summed rarity of the distinct n-grams among the last `recent` tokens that end in
    a block, and in the block before it, [2, B, m].
    """
    half, count = same_BmXQ.size(2) // 2, max(0, recent - n + 1)
    if not count:
        return same_BmXQ.new_zeros(2, *same_BmXQ.shape[:2], dtype=torch.float32)
    hits, equal = same_BmXQ, query_BQ[:, None, :] == query_BQ[:, :, None]
    for back in range(1, n):
        hits = hits & F.pad(same_BmXQ[:, :, :-back, :-back], (back, 0, back, 0))
        equal = equal & F.pad(
            query_BQ[:, None, :-back] == query_BQ[:, :-back, None], (back, 0, back, 0)
        )
    found = torch.stack([hits[:, :, half:].any(2), hits[:, :, :half].any(2)])[..., -count:]
    again = _occurs_again(equal[:, -count:, -count:])
    rarity = _rarity(found[0], blocks).masked_fill(again[:, None], 0)
    return (found * rarity).sum(-1)


def _suffix(same_BmXQ: Tensor, half: int) -> Tensor:
    """Return the length of the longest end of the query that precedes a token of each block,
    float32 [B, m]; at most SUFFIX.
    """
    run = torch.ones_like(same_BmXQ[..., 0])
    length = torch.zeros_like(run, dtype=torch.float32)
    for back in range(min(SUFFIX, same_BmXQ.size(3), half)):
        # The token `1 + back` places before a token equals the query's one `back` before its end.
        earlier = F.pad(same_BmXQ[:, :, : -1 - back, -1 - back], (1 + back, 0))
        run = run & earlier
        length = length + run
    return length[:, :, half:].amax(-1)
