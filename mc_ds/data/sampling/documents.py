"""Samples windows that never span two documents (`data.packing: document`).

A document of n tokens has (n - 1) // T consecutive windows of T + 1 tokens (adjacent ones share one
token). They start at a random offset, drawn anew in each epoch. The documents long enough for a
window are listed once, in an index in the data cache, which is memory-mapped: memory does not grow
with the number of documents, and finding a window is a binary search.

Legend: T tokens of a sequence, D documents that have windows.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.cache import make_once
from mc_ds.data.sampling.windows import derive_key, permute
from mc_ds.data.shards import TokenShards
from mc_ds.storage import StagedFolder, write_text

LAYOUT_VERSION = 1
"""Incremented whenever the files of a `DocumentIndex` change."""
COUNTS = "counts.json"
COLUMNS = ("starts", "lengths", "windows")
AT_ONCE = 1 << 20
"""Documents indexed at a time."""


class DocumentIndex:
    """An index on disk of the documents that have windows. Pickles as its folder's path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        counts = json.loads((folder / COUNTS).read_text())
        self.windows: int = counts["windows"]
        """Number of windows of all documents."""
        self.documents: int = counts["documents"]
        """Number of documents D that have windows."""
        self.dropped: int = counts["dropped"]
        """Number of documents that are too short."""
        self.dropped_tokens: int = counts["dropped_tokens"]
        """Tokens in the documents that are too short."""
        self._starts, self._lengths, self._windows = (self._column(name) for name in COLUMNS)

    def __reduce__(self) -> tuple[type["DocumentIndex"], tuple[Path]]:
        return DocumentIndex, (self.folder,)

    def find(self, window: int) -> tuple[int, int, int, int]:
        """Return the index, first token and length of the document that has `window`, and the
        window's number within that document.
        """
        found = np.searchsorted(self._windows, np.int64(window), side="right")
        document = int(found) - 1
        return (
            document,
            int(self._starts[document]),
            int(self._lengths[document]),
            window - int(self._windows[document]),
        )

    def _column(self, name: str) -> NDArray[np.int64]:
        if not self.documents:
            return np.empty(0, dtype=np.int64)
        return np.memmap(self.folder / f"{name}.bin", dtype=np.int64, mode="r")


class DocumentSampler:
    """Draws every window of an index once per epoch; `seed` determines order and offsets."""

    def __init__(self, index: DocumentIndex, *, seq_len: int, seed: int) -> None:
        self.index, self._seq_len, self._seed = index, seq_len, seed
        self.windows_per_epoch = index.windows

    def start(self, index: int) -> int:
        """Return the first token of sample `index` >= 0: a pure function of (seed, index)."""
        epoch, position = divmod(index, self.windows_per_epoch)
        key = derive_key(self._seed, epoch)
        window = permute(position, self.windows_per_epoch, key)
        document, start, length, within = self.index.find(window)
        offsets = (length - 1) % self._seq_len + 1
        return start + derive_key(key, 1, document) % offsets + within * self._seq_len


def index_documents(
    shards: TokenShards, *, seq_len: int, min_document_tokens: int, cache: Path
) -> DocumentIndex:
    """Open the index of `shards` in the folder `cache`; build it first if it does not exist.

    Leaves out documents with fewer than T + 1 or `min_document_tokens` tokens. Raises ConfigError
    if none remains or if `cache` cannot be written.
    """
    shortest = max(seq_len + 1, min_document_tokens)
    facts = [LAYOUT_VERSION, shards.index.documents_sha256, len(shards), seq_len, shortest]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = cache / f"documents-{key}"
    make_once(folder, lambda staged: _build(staged, shards, seq_len, shortest))
    index = DocumentIndex(folder)
    if not index.windows:
        wanted = (
            f"data.min_document_tokens = {min_document_tokens}"
            if min_document_tokens > seq_len
            else f"mc.seq_len + 1 = {seq_len + 1}"
        )
        raise ConfigError(
            f"data.packing = document: none of the {index.dropped:,} documents of {shards.folder}"
            f" has at least {wanted} tokens: use shorter sequences, longer documents, or"
            " data.packing = stream"
        )
    return index


def _build(staged: StagedFolder, shards: TokenShards, seq_len: int, shortest: int) -> None:
    """Write an index to `staged`, AT_ONCE documents at a time, and publish it."""
    windows = kept = dropped_tokens = 0
    files = [(staged.path / f"{name}.bin").open("wb") for name in COLUMNS]
    try:
        for first in range(0, len(shards.documents), AT_ONCE):
            bounds = shards.documents[first : first + AT_ONCE + 1].astype(np.int64)
            if first + AT_ONCE >= len(shards.documents):
                bounds = np.append(bounds, len(shards))
            lengths = np.diff(bounds)
            long = lengths >= shortest
            dropped_tokens += int(lengths[~long].sum())
            kept += int(long.sum())
            ends = np.cumsum((lengths[long] - 1) // seq_len) + windows
            firsts = np.concatenate([[windows], ends])[:-1]
            windows = int(ends[-1]) if ends.size else windows
            for file, column in zip(files, (bounds[:-1][long], lengths[long], firsts), strict=True):
                file.write(column.astype(np.int64).tobytes())
    finally:
        for file in files:
            file.close()
    counts = {
        "windows": windows,
        "documents": kept,
        "dropped": len(shards.documents) - kept,
        "dropped_tokens": dropped_tokens,
    }
    write_text(staged.path / COUNTS, json.dumps(counts) + "\n")
    staged.publish()
