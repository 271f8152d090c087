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

KINDS: tuple[type[HFTokenizer] | type[SentencePieceTokenizer], ...] = (
    HFTokenizer,
    SentencePieceTokenizer,
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder: a bundle, a cache folder, or a Hugging Face folder, where
    its `tokenizer.json` counts and nothing else.

    Where a manifest lists one of several, that one counts. Raises ConfigError where there is none
    or a damaged one.
    """
    if not folder.is_dir():
        wrong = "is a file, not the folder that holds it" if folder.exists() else "does not exist"
        raise ConfigError(f"tokenizer: {folder} {wrong}: give the folder of a tokenizer")
    there = [kind for kind in KINDS if (folder / kind.file_name).exists()]
    listed = [kind for kind in there if kind.file_name in _listed(folder)]
    for kind in listed or there:
        return kind.load(folder / kind.file_name)
    raise ConfigError(
        f"{folder} has no tokenizer: a file {' or '.join(kind.file_name for kind in KINDS)} was"
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
