"""Token shards: a corpus as one sequence of token ids in memory-mapped files.

Shards contain little-endian uint16 ids (uint32 for a large vocabulary). Documents follow each other
without gaps and may cross shards. `documents.bin` contains the start of each document in the
sequence, as little-endian uint64. `index.json` is written last: without it a folder is incomplete.
"""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mc_ds.data.shard_index import INDEX_NAME, ShardIndex, ShardInfo, damaged, read_index
from mc_ds.storage import FileFacts, HashingFile, fingerprint, write_text

DOCUMENTS_NAME = "documents.bin"
START = np.dtype("<u8")
"""Data type of `documents.bin`."""
SHARD_TOKENS = 1 << 26
"""Tokens per shard: 128 MiB of uint16."""


class ShardWriter:
    """Appends documents to a new folder of shards.

    A context manager: leaving it without an error writes the index. `files` then has the size and
    hash of every file, by name.
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
            raise ValueError(f"{folder} already has complete token shards: use a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._vocab_size = vocab_size
        self._tokenizer_sha256 = tokenizer_sha256
        self._shard_tokens = shard_tokens
        self._dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.files: dict[str, FileFacts] = {}
        self.token_count = self.document_count = 0
        self._finished: list[ShardInfo] = []
        self._file: HashingFile | None = None
        self._file_tokens = 0
        self._documents = HashingFile(folder / DOCUMENTS_NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._close_shard()
            if error[0] is None:
                self._write_index()
        finally:
            self._documents.close()

    def _write_index(self) -> None:
        facts = self.files[DOCUMENTS_NAME] = self._documents.finish()
        index = ShardIndex(
            dtype=self._dtype,
            vocab_size=self._vocab_size,
            tokenizer_sha256=self._tokenizer_sha256,
            token_count=self.token_count,
            shards=self._finished,
            document_count=self.document_count,
            documents_sha256=facts.sha256,
        )
        self.files[INDEX_NAME] = write_text(
            self.folder / INDEX_NAME, index.model_dump_json(indent=1) + "\n"
        )

    def append(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Add one document of [n] ids. Raises ValueError for an id outside the vocabulary."""
        self.extend(tokens, np.zeros(1, dtype=np.int64))

    def extend(self, tokens: NDArray[np.integer[Any]], starts: NDArray[np.integer[Any]]) -> None:
        """Add the [n] ids of several documents, which start at the ascending indices `starts`.

        Tokens before the first start continue the previous document. Raises ValueError for an id
        outside the vocabulary.
        """
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(
                f"token ids {tokens.min()} to {tokens.max()} exceed the vocabulary of"
                f" {self._vocab_size}: encode with the tokenizer of these shards"
            )
        self._documents.write((starts + self.token_count).astype(START).tobytes())
        self.document_count += starts.size
        self.token_count += tokens.size
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
        facts = self.files[self._shard_name()] = self._file.finish()
        self._file.close()
        self._finished.append(
            ShardInfo(file=self._shard_name(), tokens=self._file_tokens, sha256=facts.sha256)
        )
        self._file, self._file_tokens = None, 0


class TokenShards:
    """All shards of a folder as one sequence of `len(shards)` tokens, memory-mapped.

    Opening checks every file's size; `verify` reads and hashes the files. Both raise ValueError for
    a damaged file. Pickles as its folder's path, so that loader processes map the files themselves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._ends = np.cumsum([shard.tokens for shard in self.index.shards], dtype=np.int64)
        self._maps = [self._map(shard) for shard in self.index.shards]
        self.documents: NDArray[np.uint64] = _memory_map(
            folder / DOCUMENTS_NAME, START, self.index.document_count
        )
        """[documents] first token of each document, ascending. A document ends where the next one
        starts.
        """

    def __len__(self) -> int:
        return self.index.token_count

    def __reduce__(self) -> tuple[type["TokenShards"], tuple[Path]]:
        return TokenShards, (self.folder,)

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length) as a new int64 array, reading only these.

        Raises ValueError for a range outside the corpus.
        """
        if not 0 <= start <= start + length <= len(self):
            raise ValueError(
                f"window [{start}, {start + length}) is outside of the {len(self)} tokens of"
                f" {self.folder}"
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
        """Read and hash all files, and return self. Raises ValueError if one differs from the
        index.
        """
        files = {shard.file: shard.sha256 for shard in self.index.shards}
        for name, sha256 in {**files, DOCUMENTS_NAME: self.index.documents_sha256}.items():
            if fingerprint(self.folder / name).sha256 != sha256:
                raise ValueError(
                    damaged(self.folder / name, "its content differs from the hash in the index")
                )
        return self

    def _map(self, shard: ShardInfo) -> NDArray[Any]:
        return _memory_map(self.folder / shard.file, self._dtype, shard.tokens)


def _memory_map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Memory-map a file of `count` numbers. Raises ValueError if its size differs."""
    expected = count * dtype.itemsize
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(damaged(path, f"it cannot be read ({error.strerror})")) from None
    if size != expected:
        raise ValueError(damaged(path, f"it has {size} bytes, the index says {expected}"))
    if not count:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
