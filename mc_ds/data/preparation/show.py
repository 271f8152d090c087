"""Describes a dataset as lines of text."""

from collections.abc import Iterator
from pathlib import Path

from mc_ds.data.dataset import Dataset, open_dataset
from mc_ds.data.manifest import SPLITS, SplitFacts
from mc_ds.data.shards import TokenShards

SHOWN_TOKENS = 200
"""Tokens shown from the start of each document."""
BAR = 40
"""Length of the longest bar, in characters."""


def describe(path: Path, *, documents: int = 3) -> Iterator[str]:
    """Yield lines that describe the dataset at `path`: counts, sources, document lengths, and the
    first `documents` of each split. Raises ConfigError if `path` is not a dataset.
    """
    dataset = open_dataset(path)
    manifest = dataset.manifest
    made_with = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    ids = f"vocabulary {manifest.vocab_size:,}, ids as {manifest.dtype}"
    yield f"{path}: {ids}, made with {made_with}"
    for source in manifest.sources:
        yield f"source {source.name}: {source.files:,} files, {source.bytes / 1e6:,.1f} MB"
    if manifest.skipped:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
        yield f"skipped: {skipped}"
    yield f"licence: {manifest.licence or 'not given'}"
    for split in SPLITS:
        facts = manifest.splits[split]
        yield f"{split}: {facts.documents:,} documents, {facts.tokens:,} tokens"
        yield from _lengths(facts)
    for split, shards in (("train", dataset.train), ("validation", dataset.validation)):
        for number in range(min(documents, len(shards.documents))):
            yield from _document(dataset, split, shards, number)


def _lengths(facts: SplitFacts) -> Iterator[str]:
    largest = max(facts.document_lengths, default=0)
    for exponent, count in enumerate(facts.document_lengths):
        if count:
            bar = "█" * max(1, BAR * count // largest)
            yield f"  {1 << exponent:>11,} tokens and more: {count:>11,} {bar}"


def _document(dataset: Dataset, split: str, shards: TokenShards, number: int) -> Iterator[str]:
    start = int(shards.documents[number])
    ends = shards.documents[number + 1 : number + 2].tolist() or [len(shards)]
    length = int(ends[0]) - start
    yield f"--- {split} document {number}, {length:,} tokens"
    yield dataset.tokenizer.decode(shards.window(start, min(length, SHOWN_TOKENS)))
