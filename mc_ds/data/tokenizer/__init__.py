"""Tokenizers: sentencepiece models, which this project can train, and the `tokenizer.json` of
pretrained models.
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
"""Name of the tokenizer's folder within a dataset."""
KINDS: tuple[type[HFTokenizer] | type[SentencePieceTokenizer], ...] = (
    HFTokenizer,
    SentencePieceTokenizer,
)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a file (`tokenizer.json` or any sentencepiece `.model`) or a folder.

    The folder may be a bundle, a run, a dataset, a cache folder or a Hugging Face model, of which
    only `tokenizer.json` is used. If it has several tokenizers, that listed in its manifest is
    used. Raises ConfigError if there is none or it is damaged.
    """
    if path.is_file():
        return (SentencePieceTokenizer if path.suffix == ".model" else HFTokenizer).load(path)
    if not path.exists():
        raise ConfigError(f"tokenizer: {path} does not exist: give a tokenizer's file or folder")
    for folder in (path, path / FOLDER):
        found = [kind for kind in KINDS if (folder / kind.file_name).exists()]
        listed = [kind for kind in found if kind.file_name in _listed(folder)]
        for kind in listed or found:
            return kind.load(folder / kind.file_name)
    raise ConfigError(
        f"{path} has no tokenizer: should contain {' or '.join(kind.file_name for kind in KINDS)}"
    )


def _listed(folder: Path) -> Collection[str]:
    """Return the file names in a folder's manifest; empty if it has no readable one."""
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
