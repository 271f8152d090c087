"""Token shards: a corpus as one long row of token ids in memory-mapped files, beside a JSON
index.

Files hold little-endian uint16 ids (uint32 where the vocabulary needs them); documents lie end
to end and may cross shards. The writer only ever appends, and writes the index last: a folder
without one is unfinished.
"""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mc_ds.storage import HashingFile, fingerprint, write_text

INDEX_NAME = "index.json"
SHARD_TOKENS = 1 << 26
"""Tokens per shard, 128 MiB of uint16."""


class ShardInfo(BaseModel):
    """One file of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    tokens: int
    sha256: str


class ShardIndex(BaseModel):
    """What the folder holds; `tokenizer_sha256` names the model that made the ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mc_ds.token_shards.v1"] = "mc_ds.token_shards.v1"
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_sha256: str
    token_count: int
    shards: list[ShardInfo]


class ShardWriter:
    """Appends documents to a new folder of shards. Use as a context manager: leaving it without
    an error writes the index.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        tokenizer_sha256: str,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        if (folder / INDEX_NAME).exists():
            raise ValueError(f"{folder} already holds finished token shards: write to a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._vocab_size = vocab_size
        self._tokenizer_sha256 = tokenizer_sha256
        self._shard_tokens = shard_tokens
        self._dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._finished: list[ShardInfo] = []
        self._file: HashingFile | None = None
        self._file_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close_shard()
        if error[0] is None:
            index = ShardIndex(
                dtype=self._dtype,
                vocab_size=self._vocab_size,
                tokenizer_sha256=self._tokenizer_sha256,
                token_count=sum(shard.tokens for shard in self._finished),
                shards=self._finished,
            )
            write_text(self.folder / INDEX_NAME, index.model_dump_json(indent=1) + "\n")

    def append(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Add one document, [n] ids. Raises ValueError for an id outside the vocabulary."""
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(
                f"token ids {tokens.min()}..{tokens.max()} do not fit a vocabulary of"
                f" {self._vocab_size}: use its tokenizer"
            )
        ids = tokens.astype(f"<{np.dtype(self._dtype).str[1:]}")
        while ids.size:
            part, ids = np.split(ids, [self._shard_tokens - self._file_tokens])
            self._write(part)

    def _write(self, ids: NDArray[Any]) -> None:
        if self._file is None:
            self._file = HashingFile(self.folder / self._shard_name())
        self._file.write(ids.tobytes())
        self._file_tokens += ids.size
        if self._file_tokens == self._shard_tokens:
            self._close_shard()

    def _shard_name(self) -> str:
        return f"tokens-{len(self._finished):05d}.bin"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        facts = self._file.finish()
        self._file.close()
        self._finished.append(
            ShardInfo(file=self._shard_name(), tokens=self._file_tokens, sha256=facts.sha256)
        )
        self._file, self._file_tokens = None, 0


class TokenShards:
    """All shards of a folder as one row of `len(shards)` tokens.

    Opening checks the size of every file; `verify` reads and hashes them. Both raise ValueError
    in one line that names the damaged file. Pickles as its folder, so that loader processes map
    the files themselves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._ends = np.cumsum([shard.tokens for shard in self.index.shards], dtype=np.int64)
        self._maps = [self._map(shard) for shard in self.index.shards]

    def __len__(self) -> int:
        return self.index.token_count

    def __reduce__(self) -> tuple[type["TokenShards"], tuple[Path]]:
        return TokenShards, (self.folder,)

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length) as a new int64 array; only these are read. Raises
        ValueError outside of the corpus.
        """
        if not 0 <= start <= start + length <= len(self):
            raise ValueError(
                f"window [{start}, {start + length}) leaves the {len(self)} tokens of {self.folder}"
            )
        out = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            shard = int(np.searchsorted(self._ends, start + filled, side="right"))
            offset = start + filled - (int(self._ends[shard]) - len(self._maps[shard]))
            part = self._maps[shard][offset : offset + length - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def verify(self) -> Self:
        """Returns self if every file has the content that was written."""
        for shard in self.index.shards:
            if fingerprint(self.folder / shard.file).sha256 != shard.sha256:
                raise ValueError(
                    _damaged(self.folder / shard.file, "its content is not what was written")
                )
        return self

    def _map(self, shard: ShardInfo) -> NDArray[Any]:
        path = self.folder / shard.file
        expected = shard.tokens * self._dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(_damaged(path, f"it cannot be read ({error.strerror})")) from None
        if size != expected:
            raise ValueError(_damaged(path, f"it has {size} bytes, its index says {expected}"))
        return np.memmap(path, dtype=self._dtype, mode="r")


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX_NAME
    try:
        index = ShardIndex.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(_damaged(path, f"it cannot be read ({error.strerror})")) from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            _damaged(path, f"{'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}")
        ) from None
    total = sum(shard.tokens for shard in index.shards)
    if total != index.token_count:
        raise ValueError(
            _damaged(
                path, f"its shards add up to {total} tokens, not token_count = {index.token_count}"
            )
        )
    return index


def _damaged(path: Path, problem: str) -> str:
    return f"damaged token shard {path}: {problem}; delete the folder and prepare the data again"
