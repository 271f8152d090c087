"""The index of token shards: which files there are, of how many tokens, with which hashes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

INDEX_NAME = "index.json"


class ShardInfo(BaseModel):
    """One file of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    tokens: int
    sha256: str


class ShardIndex(BaseModel):
    """What the folder holds; `tokenizer_sha256` names the model that made the ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mc_ds.token_shards.v2"] = "mc_ds.token_shards.v2"
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_sha256: str
    token_count: int
    shards: list[ShardInfo]
    document_count: int
    documents_sha256: str
    """Of `documents.bin`."""


def read_index(folder: Path) -> ShardIndex:
    """Return the index of a folder. Raises ValueError, in one line, for a damaged one."""
    path = folder / INDEX_NAME
    try:
        index = ShardIndex.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(damaged(path, f"it cannot be read ({error.strerror})")) from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            damaged(path, f"{'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}")
        ) from None
    total = sum(shard.tokens for shard in index.shards)
    if total != index.token_count:
        raise ValueError(
            damaged(
                path, f"its shards add up to {total} tokens, not token_count = {index.token_count}"
            )
        )
    return index


def damaged(path: Path, problem: str) -> str:
    """Return the line that tells of a damaged file, and what to do."""
    return f"damaged token shard {path}: {problem}; delete the folder and prepare the data again"
