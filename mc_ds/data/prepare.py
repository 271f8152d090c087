"""`prepare_corpus`: makes the tokenizer and token shards of a corpus, once, in the data cache.

The cache folder's name is a digest of everything that determines its content. One process builds it
while the others wait, and publishes it atomically, so that a killed process leaves nothing that
looks complete.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mc_ds.config import ConfigError, DataConfig
from mc_ds.data.cache import make_once
from mc_ds.data.corpus import Corpus, FilesCorpus, Split, StdlibCorpus
from mc_ds.data.shards import ShardWriter, TokenShards
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, trainer_fingerprint
from mc_ds.storage import StagedFolder

LAYOUT_VERSION = 3
"""Incremented whenever the files in a cache folder change."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus ready for training."""

    folder: Path
    """Cache folder. Its name has a digest of the content, so ranks with equal data agree on it."""
    fingerprint: str
    """Digest of the text alone, independent of the tokenizer."""
    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards


def prepare_corpus(
    config: DataConfig,
    corpus: Corpus | None = None,
    report: Callable[[str], None] = print,
    *,
    tokenizer: Tokenizer | None = None,
    verify: bool = True,
) -> PreparedCorpus:
    """Open the prepared corpus; if the cache has none, prepare it and `report` a line per stage.

    `corpus` and `tokenizer` override those of `config`. `verify` hashes all files; without it, as
    for ranks whose files another rank verifies, only sizes are compared. Raises ConfigError if the
    tokenizer cannot be trained or read or a split is empty, ValueError for a damaged cache.
    """
    if tokenizer is not None:
        given: Tokenizer | None = tokenizer
        config = config.model_copy(update={"tokenizer": None})
    else:
        given = load_tokenizer(Path(config.tokenizer)) if config.tokenizer is not None else None
    corpus = make_corpus(config) if corpus is None else corpus
    cache, fingerprint = Path(config.cache_dir), corpus.fingerprint()
    folder = cache / f"{corpus.name}-{_cache_key(fingerprint, config, given)}"
    make_once(folder, lambda staged: _build(staged, corpus, config, given, report))
    return open_prepared(folder, fingerprint, verify=verify)


def make_corpus(config: DataConfig) -> Corpus:
    """Return the corpus selected by `config.source`."""
    match config.source:
        case "stdlib":
            return StdlibCorpus(config.val_fraction)
        case "files":
            if config.root is None:
                raise ConfigError(
                    "data.source = 'files' needs data.root: give the folder with the text files"
                )
            return FilesCorpus(config.val_fraction, Path(config.root), config.patterns)


def open_prepared(folder: Path, fingerprint: str, *, verify: bool = True) -> PreparedCorpus:
    """Open a folder made by `prepare_corpus`; `verify` reads and hashes all files.

    Raises ValueError if anything is missing or damaged.
    """
    tokenizer = load_tokenizer(folder)
    shards = {split: TokenShards(folder / split) for split in get_args(Split)}
    for opened in shards.values() if verify else ():
        opened.verify()
    for split, opened in shards.items():
        if opened.index.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder / split} was not encoded with {folder / tokenizer.file_name}: delete"
                f" {folder} and start again, which prepares the data anew"
            )
    return PreparedCorpus(
        folder=folder,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        train=shards["train"],
        val=shards["val"],
    )


def _cache_key(fingerprint: str, config: DataConfig, given: Tokenizer | None) -> str:
    tokenizer = (
        [config.vocab_size, trainer_fingerprint()] if given is None else ["given", given.sha256]
    )
    parts = [LAYOUT_VERSION, fingerprint, *tokenizer]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _build(
    staged: StagedFolder,
    corpus: Corpus,
    config: DataConfig,
    given: Tokenizer | None,
    report: Callable[[str], None],
) -> None:
    """Write and publish the cache folder, with the `given` tokenizer or one trained on the
    corpus.
    """
    started = time.monotonic()
    once = f"only once; cached in {staged.target}"
    tokenizer = given
    if tokenizer is None:
        report(
            f"data: training a tokenizer with a vocabulary of {config.vocab_size} on {corpus.name}"
            f" ({once})"
        )
        tokenizer = train_tokenizer(corpus.documents("train"), config.vocab_size)
        report(
            f"data: tokenizer ready after {time.monotonic() - started:.1f} s, encoding"
            f" {corpus.name}"
        )
    else:
        whose = config.tokenizer or "the model"
        report(f"data: encoding {corpus.name} with the tokenizer of {whose} ({once})")
    tokenizer.save(staged.path)
    counts = {
        split: _write_split(staged.path / split, corpus, split, tokenizer)
        for split in get_args(Split)
    }
    staged.publish()
    sizes = ", ".join(f"{split} {count:,} tokens" for split, count in counts.items())
    report(f"data: {sizes}; ready after {time.monotonic() - started:.1f} s")


def _write_split(folder: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer) -> int:
    """Write the shards of one split; return its number of tokens."""
    count = 0
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for tokens in tokenizer.encode_documents(corpus.documents(split)):
            writer.append(tokens)
            count += tokens.size
    if count == 0:
        raise ConfigError(
            f"no document of {corpus.name} falls into the {split} split: change data.val_fraction"
            " or add documents"
        )
    return count
