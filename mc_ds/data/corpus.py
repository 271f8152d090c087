"""Where text comes from: documents by split, and a fingerprint that changes whenever any of them does."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from mc_ds.config.errors import ConfigError

Split = Literal["train", "val"]

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders of the standard library that hold tests (of the library and of idlelib, lib2to3, ...), or installed packages."""


class Corpus(Protocol):
    """A body of text. Two corpora with equal fingerprints yield the same documents in the same order."""

    @property
    def name(self) -> str:
        """Short name for folders and messages."""
        ...

    def fingerprint(self) -> str:
        """Digest of everything that `documents` depends on."""
        ...

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split, in a fixed order. No document is in both splits."""
        ...


def split_of(name: str, val_fraction: float) -> Split:
    """The split of a document: a function of its name alone, so that adding documents moves none of the others."""
    digest = hashlib.sha256(name.encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


class StdlibCorpus:
    """The source of this machine's own Python standard library, without its tests: one document per file.

    `root` is the folder to read, by default the one `sysconfig` names. Raises ConfigError where it holds no source.
    """

    name = "stdlib"

    def __init__(self, val_fraction: float, root: Path | None = None) -> None:
        self.val_fraction = val_fraction
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.files = _python_files(self.root)
        if not self.files:
            raise ConfigError(f"no Python source under {self.root}: install the standard library's .py files or use another interpreter")

    def fingerprint(self) -> str:
        """Digest of the split and of every file's relative path and content."""
        digest = hashlib.sha256(repr(self.val_fraction).encode())
        for name in self.files:
            content = (self.root / name).read_bytes()
            digest.update(f"\n{name}\n{hashlib.sha256(content).hexdigest()}".encode())
        return digest.hexdigest()

    def split_files(self, split: Split) -> list[str]:
        """Relative paths of the files of one split, sorted."""
        return [name for name in self.files if split_of(name, self.val_fraction) == split]

    def documents(self, split: Split) -> Iterator[str]:
        """Text of each non-empty file of the split, decoded as Python would decode it."""
        for name in self.split_files(split):
            with tokenize.open(self.root / name) as file:
                text = file.read()
            if text:
                yield text


def _python_files(root: Path) -> list[str]:
    """Relative POSIX paths of the .py files below `root`, sorted, without `EXCLUDED_FOLDERS`."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)
