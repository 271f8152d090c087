"""`open_data`: opens the text of a run as domains, each with the token shards of one dataset.

With `data.datasets` every rank checks file sizes and reads no content. Without it, a small corpus
is prepared once per cache, and is the only domain.
"""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_ds.config import ConfigError, DataConfig
from mc_ds.config.data import DatasetConfig
from mc_ds.data.corpus import FilesCorpus
from mc_ds.data.dataset import open_dataset
from mc_ds.data.manifest import DatasetManifest, read_manifest
from mc_ds.data.prepare import PreparedCorpus, make_corpus, prepare_corpus
from mc_ds.data.shards import TokenShards
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer
from mc_ds.storage import MANIFEST, fingerprint

CORPUS = "corpus"
"""Name of the only domain of a run without datasets."""


@dataclass(frozen=True)
class Domain:
    """One dataset's tokens of one split, with its weight in the mixture."""

    name: str
    weight: float
    shards: TokenShards


@dataclass(frozen=True)
class RunData:
    """All text of a run, opened."""

    title: str
    """Short description for messages."""
    identity: str
    """Digests and weights of the domains. Must be equal on all ranks and when a run resumes."""
    fingerprint: str
    """Digest of the text alone, independent of tokenizer and weights."""
    tokenizer: Tokenizer
    cache: Path
    """Cache folder for indices made from the text."""
    train: tuple[Domain, ...]
    val: tuple[Domain, ...]

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> "RunData":
        """Wrap a prepared corpus as the only domain."""
        return cls(
            title=corpus.folder.name.rpartition("-")[0],
            identity=corpus.folder.name,
            fingerprint=corpus.fingerprint,
            tokenizer=corpus.tokenizer,
            cache=corpus.folder.parent,
            train=(Domain(CORPUS, 1.0, corpus.train),),
            val=(Domain(CORPUS, 1.0, corpus.val),),
        )


@dataclass(frozen=True)
class OtherText:
    """Text to evaluate on instead of that of a config."""

    root: str | None = None
    """Folder of text files."""
    datasets: Sequence[str] = ()
    """Datasets made by tools/prepare_data.py; used if there is no `root`."""
    whole: bool = False
    """Whether to read all of the text, not only its held-out part."""

    def settings(self, config: DataConfig, *, tokenizer: Path | None) -> DataConfig:
        """Return `config` with this text instead of its own. `tokenizer` is named in the error for
        a dataset that was made with another one.
        """
        changes: dict[str, Any] = {"datasets": [], "validation": []}
        if self.root is not None:
            changes |= {"source": "files", "root": self.root}
        else:
            changes |= {
                "datasets": [DatasetConfig(path=path) for path in self.datasets],
                "tokenizer": None if tokenizer is None else str(tokenizer),
            }
        return config.model_copy(update=changes)


def open_data(
    config: DataConfig, *, tokenizer: Tokenizer | None = None, verify: bool = True
) -> RunData:
    """Open the datasets of `config`, or prepare its corpus.

    `tokenizer` overrides that of `config`; datasets must have been made with it. `verify` hashes
    all files of a prepared corpus; of datasets only sizes are compared (see `verify_content`).
    Raises ConfigError if data cannot be read, is damaged or does not match the tokenizer, and
    ValueError for a damaged cache.
    """
    if config.datasets:
        return _open_datasets(config, tokenizer)
    if config.source == "files":
        _refuse_large(config)
    return RunData.of(prepare_corpus(config, tokenizer=tokenizer, verify=verify))


def check_datasets(config: DataConfig) -> DatasetManifest:
    """Read the manifests of all datasets, and nothing else, and return the first.

    Raises ConfigError if a dataset is missing or was not made with the tokenizer of `config`, or
    else with the first one's.
    """
    manifests = {
        entry.path: read_manifest(Path(entry.path).expanduser())
        for entry in [*config.datasets, *config.validation]
    }
    _check_tokenizers(config, manifests, None)
    return manifests[config.datasets[0].path]


def verify_content(config: DataConfig) -> None:
    """Verify the content of all datasets by reading and hashing their files.

    Raises ConfigError for the first damaged dataset.
    """
    for path in dict.fromkeys(entry.path for entry in [*config.datasets, *config.validation]):
        open_dataset(path, verify="content")


def _open_datasets(config: DataConfig, tokenizer: Tokenizer | None) -> RunData:
    opened = {
        entry.path: open_dataset(entry.path) for entry in [*config.datasets, *config.validation]
    }
    hashes = {path: fingerprint(dataset.path / MANIFEST).sha256 for path, dataset in opened.items()}
    manifests = {path: dataset.manifest for path, dataset in opened.items()}
    _check_tokenizers(config, manifests, tokenizer)
    seen: dict[str, str] = {}
    for entry in config.datasets:
        sha256 = hashes[entry.path]
        if sha256 in seen:
            raise ConfigError(
                f"data.datasets: {seen[sha256]} and {entry.path} are the same dataset: list it"
                " once, with the sum of the weights"
            )
        seen[sha256] = entry.path
    mixture = [(hashes[entry.path], entry.weight) for entry in config.datasets]
    first = opened[config.datasets[0].path]
    return RunData(
        title=", ".join(entry.label for entry in config.datasets),
        identity=", ".join(f"{sha256[:16]} x {weight:g}" for sha256, weight in mixture),
        fingerprint=hashlib.sha256(json.dumps(sorted(seen)).encode()).hexdigest(),
        tokenizer=first.tokenizer,
        cache=Path(config.cache_dir),
        train=_domains(config.datasets, {path: d.train for path, d in opened.items()}),
        val=_domains(
            config.validation or config.datasets,
            {path: d.validation for path, d in opened.items()},
        ),
    )


def _domains(
    entries: Sequence[DatasetConfig], shards: dict[str, TokenShards]
) -> tuple[Domain, ...]:
    return tuple(Domain(entry.label, entry.weight, shards[entry.path]) for entry in entries)


def _check_tokenizers(
    config: DataConfig, manifests: dict[str, DatasetManifest], tokenizer: Tokenizer | None
) -> None:
    """Raise ConfigError if a dataset was not made with the expected tokenizer.

    That is `tokenizer`, else `config.tokenizer`, else the first dataset's.
    """
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    if tokenizer is not None:
        whose = config.tokenizer or "the model"
        size, sha256 = tokenizer.vocab_size, tokenizer.sha256
    else:
        whose, first = next(iter(manifests.items()))
        size, sha256 = first.vocab_size, first.tokenizer_sha256
    for path, manifest in manifests.items():
        if manifest.tokenizer_sha256 != sha256:
            raise ConfigError(
                f"dataset {path} was made with another tokenizer (vocabulary"
                f" {manifest.vocab_size}) than {whose} (vocabulary {size}): prepare it again with"
                f" tools/prepare_data.py --tokenizer {whose}"
            )


def _refuse_large(config: DataConfig) -> None:
    """Raise ConfigError for a corpus above `inline_limit_mb`, too large to prepare while ranks
    wait.

    The message contains the command that prepares it.
    """
    corpus = make_corpus(config)
    assert isinstance(corpus, FilesCorpus)
    megabytes = sum((corpus.root / name).stat().st_size for name in corpus.files) / 1e6
    if megabytes <= config.inline_limit_mb:
        return
    tokenizer = (
        ["--train_tokenizer", "--vocab_size", str(config.vocab_size)]
        if config.tokenizer is None
        else ["--tokenizer", config.tokenizer]
    )
    inputs = [str(corpus.root)]
    if config.patterns != DataConfig.model_fields["patterns"].default:
        inputs = [
            str(corpus.root / (pattern if "/" in pattern else f"**/{pattern}"))
            for pattern in config.patterns
        ]
    held_out = ["--val_fraction", f"{config.val_fraction:g}"]
    command = [
        *("python", "tools/prepare_data.py", *inputs, "--out", "DATASET"),
        *(*tokenizer, *held_out),
    ]
    raise ConfigError(
        f"data.root = {config.root} has {megabytes:,.0f} MB of text, above data.inline_limit_mb ="
        f" {config.inline_limit_mb:g}: run `{shlex.join(command)}` once, then train with"
        """ --data.datasets '[{"path": "DATASET"}]'"""
    )
