"""The index of a folder of token shards: its files with their token counts and hashes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

INDEX_NAME = "index.json"


class ShardInfo(BaseModel):
    """One file of token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    tokens: int
    sha256: str


class ShardIndex(BaseModel):
    """Content of `index.json`. `tokenizer_sha256` identifies the tokenizer that made the ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mc_ds.token_shards.v2"] = "mc_ds.token_shards.v2"
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_sha256: str
    token_count: int
    shards: list[ShardInfo]
    document_count: int
    documents_sha256: str
    """Hash of `documents.bin`."""


def read_index(folder: Path) -> ShardIndex:
    """Return the index of a folder. Raises ValueError if it is missing or damaged."""
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
                path,
                f"its shards have {total} tokens in total, but token_count = {index.token_count}",
            )
        )
    return index


def damaged(path: Path, problem: str) -> str:
    """Return the error message for a damaged file, with the remedy."""
    return f"damaged token shard {path}: {problem}; delete the folder and prepare the data again"
