"""`prepare_corpus`: from a `DataConfig` to a tokenizer and token shards, made once and cached.

The cache folder is named by a digest of all that decides its content. It is built under a lock in a temporary folder and renamed when
complete, so that any number of processes may ask for it at once and a killed one leaves nothing that looks finished.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mc_ds.config import ConfigError, DataConfig
from mc_ds.data.corpus import Corpus, FilesCorpus, Split, StdlibCorpus
from mc_ds.data.shards import ShardWriter, TokenShards
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, trainer_fingerprint

LAYOUT_VERSION = 1
"""Raised whenever this module or the shard format changes what a cache folder holds."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus ready for training."""

    folder: Path
    """Cache folder; its name is the digest of all that decides its content, equal on every rank that has the same data."""
    fingerprint: str
    """Digest of the text that it was made of, whatever the tokenizer."""
    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards


def prepare_corpus(
    config: DataConfig,
    corpus: Corpus | None = None,
    report: Callable[[str], None] = print,
    *,
    tokenizer: Tokenizer | None = None,
) -> PreparedCorpus:
    """Opens the prepared corpus, after making it if the cache has none; `report` then gets one line per stage.

    `corpus` and `tokenizer` replace those that `config` names. Raises ConfigError for a tokenizer that cannot be trained or read, or an empty
    split, ValueError for a damaged cache.
    """
    if tokenizer is not None:
        given: Tokenizer | None = tokenizer
        config = config.model_copy(update={"tokenizer": None})
    else:
        given = load_tokenizer(Path(config.tokenizer)) if config.tokenizer is not None else None
    corpus = make_corpus(config) if corpus is None else corpus
    cache, fingerprint = Path(config.cache_dir), corpus.fingerprint()
    folder = cache / f"{corpus.name}-{_cache_key(fingerprint, config, given)}"
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir = {cache} cannot be made ({error.strerror}): give a folder that can"
            ) from None
        with _locked(cache / f"{folder.name}.lock"):
            if not folder.exists():
                _build(folder, corpus, config, given, report)
    return open_prepared(folder, fingerprint)


def make_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names."""
    match config.source:
        case "stdlib":
            return StdlibCorpus(config.val_fraction)
        case "files":
            if config.root is None:
                raise ConfigError(
                    "data.source = 'files' needs data.root: give the folder that holds the text"
                )
            return FilesCorpus(config.val_fraction, Path(config.root), config.patterns)


def open_prepared(folder: Path, fingerprint: str) -> PreparedCorpus:
    """Opens and verifies a folder made by `prepare_corpus`. Raises ValueError in one line where anything is missing or damaged."""
    tokenizer = load_tokenizer(folder)
    shards = {split: TokenShards(folder / split).verify() for split in get_args(Split)}
    for split, opened in shards.items():
        if opened.index.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder / split} was not made with {folder / tokenizer.file_name}: delete the folder and prepare the data again"
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
    folder: Path,
    corpus: Corpus,
    config: DataConfig,
    given: Tokenizer | None,
    report: Callable[[str], None],
) -> None:
    """Makes `folder` while holding its lock, with the `given` tokenizer or one trained on the corpus."""
    for leftover in folder.parent.glob(
        f"{folder.name}.tmp-*"
    ):  # of a process that was killed: the lock says that nobody uses it
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        started = time.monotonic()
        tokenizer = given
        if tokenizer is None:
            report(
                f"data: training a tokenizer of {config.vocab_size} pieces on {corpus.name} (once; cached in {folder})"
            )
            tokenizer = train_tokenizer(corpus.documents("train"), config.vocab_size)
            report(
                f"data: tokenizer ready after {time.monotonic() - started:.1f} s, encoding {corpus.name}"
            )
        else:
            report(
                f"data: encoding {corpus.name} with the tokenizer of {config.tokenizer or 'the model'} "
                f"(once; cached in {folder})"
            )
        tokenizer.save(temporary)
        counts = {
            split: _write_split(temporary / split, corpus, split, tokenizer)
            for split in get_args(Split)
        }
        temporary.rename(folder)
        sizes = ", ".join(f"{split} {count:,} tokens" for split, count in counts.items())
        report(f"data: {sizes}; ready after {time.monotonic() - started:.1f} s")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_split(folder: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer) -> int:
    """Writes the shards of one split; returns its tokens."""
    count = 0
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for tokens in tokenizer.encode_documents(corpus.documents(split)):
            writer.append(tokens)
            count += tokens.size
    if count == 0:
        raise ConfigError(
            f"no document of {corpus.name} falls into the {split} split: change data.val_fraction or add documents"
        )
    return count


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path` between processes; the kernel frees it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
