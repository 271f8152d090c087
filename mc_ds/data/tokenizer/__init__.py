"""Tokenizers: one interface, two kinds. Those trained here are sentencepiece models; those of
pretrained models are a `tokenizer.json`.
"""

from collections.abc import Collection
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.data.tokenizer.base import Tokenizer
from mc_ds.data.tokenizer.hf_json import HFTokenizer
from mc_ds.data.tokenizer.sentencepiece_bpe import (
    SentencePieceTokenizer,
    train_tokenizer,
    trainer_fingerprint,
)
from mc_ds.storage import read_manifest

FOLDER = "tokenizer"
"""Folder of a dataset that holds its tokenizer."""
KINDS: tuple[type[HFTokenizer] | type[SentencePieceTokenizer], ...] = (
    HFTokenizer,
    SentencePieceTokenizer,
)


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a file, a `tokenizer.json` or any sentencepiece `.model`, or of a
    folder: a bundle, a run, a dataset, a cache folder, or a Hugging Face folder, where its
    `tokenizer.json` counts and nothing else.

    Where a manifest lists one of several, that one counts. Raises ConfigError where there is none
    or a damaged one.
    """
    if path.is_file():
        return (SentencePieceTokenizer if path.suffix == ".model" else HFTokenizer).load(path)
    if not path.exists():
        raise ConfigError(f"tokenizer: {path} does not exist: give a tokenizer's file or folder")
    for folder in (path, path / FOLDER):
        there = [kind for kind in KINDS if (folder / kind.file_name).exists()]
        listed = [kind for kind in there if kind.file_name in _listed(folder)]
        for kind in listed or there:
            return kind.load(folder / kind.file_name)
    raise ConfigError(
        f"{path} has no tokenizer: a file {' or '.join(kind.file_name for kind in KINDS)} was"
        " expected there"
    )


def _listed(folder: Path) -> Collection[str]:
    """Return what the manifest of a folder lists; nothing where it has none of that kind."""
    try:
        return read_manifest(folder).keys()
    except ValueError:
        return ()


__all__ = [
    "KINDS",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
    "trainer_fingerprint",
]
