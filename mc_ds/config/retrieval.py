"""`RetrievalConfig`: how the retrieval policies ask, and what they make of the answer. Inference
only.
"""

from typing import Literal

from pydantic import Field, PositiveInt

from mc_ds.config.errors import Settings


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
