"""`FocusConfig` and `RetrievalConfig`: how LensNet's scores, or what retrieval finds, become a
working context. Inference only.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mc_ds.config.errors import Settings
from mc_ds.config.types import Depth


class FocusConfig(Settings):
    """Settings of a refocus."""

    iterations: Depth = 4
    """Rounds of scoring and editing."""
    max_replacements: PositiveInt = 256
    """Most trades (one expansion for one collapse) per row and round."""
    threshold: float = Field(default=0.02, ge=0)
    """Least difference between an expansion's score and a collapse's for a trade: hysteresis, which
    prevents edits of little effect.
    """
    cooldown: NonNegativeInt = 1
    """Rounds for which an edited block is not edited back."""
    memory: bool = True
    """Within a refocus, keep a block's score from when it was open after it has been collapsed."""


class RetrievalConfig(Settings):
    """Settings of the policies `bm25`, `ngram`, `dense` and `attention`."""

    query_tokens: PositiveInt = 16
    """The last visible tokens that are the query."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the open blocks that are retrieved; the others are the latest ones."""
    shape: Literal["blocks", "cover"] = "blocks"
    """What stands beside the open blocks: nothing, so that more of them fit (`blocks`), or gists
    of all other blocks (`cover`).
    """
