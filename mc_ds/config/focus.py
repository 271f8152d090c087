"""`FocusConfig` and `RetrievalConfig`: how LensNet's scores, or a retriever's ranking of blocks,
become a working context. Inference only.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mc_ds.config.errors import Settings
from mc_ds.config.types import Depth


class FocusConfig(Settings):
    """Settings of a refocus, which edits the working context by LensNet's scores."""

    iterations: Depth = 4
    """Rounds of scoring and editing."""
    max_replacements: PositiveInt = 256
    """Maximum trades (one expansion for one collapse) per row and round."""
    threshold: float = Field(default=0.02, ge=0)
    """Hysteresis: make a trade only if the expansion's score exceeds the collapse's by at least
    this.
    """
    cooldown: NonNegativeInt = 1
    """Rounds during which an edit of a block is not reversed."""
    memory: bool = True
    """Within a refocus, a block that is collapsed keeps the score that it had while open."""
    lens_blocks: PositiveInt | None = None
    """Contexts of tokens alone (`mc.random_blocks`): number of blocks that LensNet chooses, at most
    as many as fit; the other open blocks are the latest. Default: as many as training variants have
    random blocks.
    """
    neighbours: float = Field(default=0.0, ge=0, le=1)
    """Contexts of tokens alone: share of the larger score of its two neighbours that is added to
    each block's score, so that a fact across the border of two blocks is opened whole.
    """
    earlier_tokens: NonNegativeInt = 0
    """Contexts of tokens alone: above 0, blocks are also scored as they were this many tokens
    earlier, and the larger score counts, so that the beginning of a question is not forgotten at
    its end. Costs a second call of LensNet; not in histories that a search reads.
    """


class RetrievalConfig(Settings):
    """Settings of the policies `bm25`, `ngram`, `dense` and `attention`."""

    query_tokens: PositiveInt = 16
    """Number of last visible tokens used as the query."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the open blocks chosen by the retriever; the rest are the most recent blocks."""
    neighbours: float = Field(default=0.0, ge=0, le=1)
    """Share of the larger score of its two neighbours that is added to each block's score."""
    shape: Literal["blocks", "cover"] = "blocks"
    """What the context contains besides open blocks: nothing, so that more of them fit (`blocks`),
    or gists of all other blocks (`cover`).
    """
