"""Windows that never span two documents (`data.packing: document`).

A document of n tokens has (n - 1) // T windows of T + 1 tokens, side by side, which begin at a
random offset, another one in each epoch; what is too short for one has none. Which documents have
how many is found once, in a folder of the data cache, and memory-mapped: memory and the cost of a
window do not depend on how many documents there are.

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
"""Raised whenever what a folder of `DocumentIndex` holds changes."""
COUNTS = "counts.json"
COLUMNS = ("starts", "lengths", "windows")
AT_ONCE = 1 << 20
"""Documents that are read at a time."""


class DocumentIndex:
    """The documents of some shards that have windows. Pickles as its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        counts = json.loads((folder / COUNTS).read_text())
        self.windows: int = counts["windows"]
        """Windows of all documents."""
        self.documents: int = counts["documents"]
        """Documents D that have windows."""
        self.dropped: int = counts["dropped"]
        """Documents that are too short."""
        self.dropped_tokens: int = counts["dropped_tokens"]
        """Tokens of those."""
        self._starts, self._lengths, self._windows = (self._column(name) for name in COLUMNS)

    def __reduce__(self) -> tuple[type["DocumentIndex"], tuple[Path]]:
        return DocumentIndex, (self.folder,)

    def find(self, window: int) -> tuple[int, int, int, int]:
        """Return the document of a window, its first token, its length, and the number of the
        window within it.
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
    """Draws every window of an index once per epoch, in an order and at offsets keyed by `seed`."""

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
    """Open the index of `shards` in the folder `cache`, after making it if it has none.

    Documents of fewer than T + 1 or `min_document_tokens` tokens are left out. Raises ConfigError
    where that leaves none, or `cache` cannot be written.
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
            f" has {wanted} tokens: use shorter sequences, longer documents, or packing = stream"
        )
    return index


def _build(staged: StagedFolder, shards: TokenShards, seq_len: int, shortest: int) -> None:
    """Make the folder of an index, a million documents at a time."""
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
