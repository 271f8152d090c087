"""A dataset: a folder with a tokenizer and the token shards of two splits.

    DATASET/
      manifest.json    sizes and hashes of all files, counts, lengths, sources, versions
      tokenizer/       the file written by `Tokenizer.save`
      train/           token shards
      validation/      token shards

The folder is published atomically and never changed. Shards are memory-mapped, so opening reads
only the manifest, the tokenizer and two indices.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

import mc_ds
from mc_ds.config.errors import ConfigError
from mc_ds.data.manifest import (
    FORMAT,
    SPLITS,
    DatasetManifest,
    SourceFacts,
    SplitFacts,
    SplitName,
    read_manifest,
)
from mc_ds.data.shards import SHARD_TOKENS, ShardWriter, TokenShards
from mc_ds.data.tokenizer import FOLDER, Tokenizer, load_tokenizer
from mc_ds.storage import damage, fingerprint, recover, write_manifest

LENGTHS_AT_ONCE = 1 << 20
"""Number of document lengths in memory at a time."""


@dataclass(frozen=True)
class Dataset:
    """An open dataset."""

    path: Path
    manifest: DatasetManifest
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards


class DatasetWriter:
    """Writes a dataset into an empty staging folder, which the caller publishes.

    A context manager that closes all files; call `finish` within it to complete the dataset.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        (folder / FOLDER).mkdir()
        name = tokenizer.save(folder / FOLDER)
        self._files = {f"{FOLDER}/{name}": fingerprint(folder / FOLDER / name)}
        self._open = ExitStack()
        self._writers = {
            split: self._open.enter_context(
                ShardWriter(
                    folder / split,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer_sha256=tokenizer.sha256,
                    shard_tokens=shard_tokens,
                )
            )
            for split in SPLITS
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def append(self, split: SplitName, tokens: NDArray[np.integer[Any]]) -> None:
        """Add one document: [n] ids, starting with the separator."""
        self._writers[split].append(tokens)

    def extend(
        self,
        split: SplitName,
        tokens: NDArray[np.integer[Any]],
        starts: NDArray[np.integer[Any]],
    ) -> None:
        """Add the [n] ids of several documents, which start at indices `starts` (see
        `ShardWriter.extend`).
        """
        self._writers[split].extend(tokens, starts)

    def finish(
        self,
        *,
        sources: Sequence[SourceFacts] = (),
        skipped: Mapping[str, int] | None = None,
        settings: Mapping[str, Any] | None = None,
        licence: str = "",
    ) -> None:
        """Write the indices and the manifest, and sync all files to disk."""
        self._open.close()
        splits = {split: TokenShards(self._folder / split) for split in SPLITS}
        facts = {
            f"{split}/{name}": file
            for split, writer in self._writers.items()
            for name, file in writer.files.items()
        }
        library = self._tokenizer.library
        manifest = DatasetManifest(
            format=FORMAT,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            separator_id=self._tokenizer.separator_id,
            dtype=splits["train"].index.dtype,
            splits={split: _facts(shards) for split, shards in splits.items()},
            sources=list(sources),
            skipped=dict(skipped or {}),
            settings=dict(settings or {}),
            licence=licence,
            versions={"mc_ds": mc_ds.__version__, library: version(library)},
            files={},
        )
        write_manifest(
            self._folder, {**self._files, **facts}, **manifest.model_dump(exclude={"files"})
        )


def open_dataset(path: str | Path, *, verify: Literal["size", "content"] = "size") -> Dataset:
    """Open the dataset at `path`.

    `verify="size"` compares every file's size with the manifest; "content" also reads and hashes
    every file. Raises ConfigError if `path` is not a dataset or is damaged.
    """
    path = Path(path).expanduser()
    recover(path)
    manifest = read_manifest(path)
    remedy = "prepare it again with tools/prepare_data.py"
    if problem := damage(path, read=verify == "content"):
        raise ConfigError(f"damaged dataset {path}: {problem}: {remedy}")
    tokenizer = load_tokenizer(path)
    try:
        shards = {split: TokenShards(path / split) for split in SPLITS}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    made_with = {manifest.tokenizer_sha256, *(s.index.tokenizer_sha256 for s in shards.values())}
    if made_with != {tokenizer.sha256}:
        raise ConfigError(
            f"damaged dataset {path}: its shards were not made with its tokenizer: {remedy}"
        )
    return Dataset(path, manifest, tokenizer, shards["train"], shards["validation"])


def _facts(shards: TokenShards) -> SplitFacts:
    counts = np.zeros(64, dtype=np.int64)
    starts = shards.documents
    for first in range(0, len(starts), LENGTHS_AT_ONCE):
        some = np.asarray(starts[first : first + LENGTHS_AT_ONCE + 1], dtype=np.int64)
        lengths = np.diff(some if first + LENGTHS_AT_ONCE < len(starts) else [*some, len(shards)])
        exponents = np.frexp(lengths.astype(np.float64))[1] - 1
        counts += np.bincount(exponents, minlength=64)
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    return SplitFacts(
        documents=len(starts), tokens=len(shards), document_lengths=counts[:used].tolist()
    )
