"""Text corpora: the documents of each split, and a fingerprint of all of them."""

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Protocol

from mc_ds.config.errors import ConfigError

Split = Literal["train", "val"]

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
"""Folders of the standard library that contain tests or installed packages."""


class Corpus(Protocol):
    """A collection of documents. Equal fingerprints mean the same documents in the same order."""

    @property
    def name(self) -> str:
        """Short name for folders and messages."""
        ...

    def fingerprint(self) -> str:
        """Return the digest of everything that `documents` depends on."""
        ...

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of one split in a fixed order. No document is in both splits."""
        ...


def split_of(name: str, val_fraction: float) -> Split:
    """Return a document's split, by a hash of its name: adding documents moves no other one."""
    digest = hashlib.sha256(_bytes(name)).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


class FilesCorpus:
    """Text files below the folder `root`: one document per file, or per line of a .jsonl file
    (its field "text").

    `patterns` are shell patterns of file names, or of paths below `root` (`docs/*.md`). Raises
    ConfigError if no file matches, or for a .jsonl line without text.
    """

    name = "files"

    def __init__(self, val_fraction: float, root: Path, patterns: Sequence[str]) -> None:
        self.val_fraction, self.root = val_fraction, root
        self.files = sorted(
            name
            for name in _files(root, frozenset())
            if any(fnmatch(name, p) or fnmatch(Path(name).name, p) for p in patterns)
        )
        if not self.files:
            wanted = ", ".join(patterns)
            raise ConfigError(
                f"data.root = {root} contains no file that matches {wanted}: give a folder with"
                " text, or other data.patterns"
            )

    def fingerprint(self) -> str:
        """Return the digest of the split and of every file's relative path and content."""
        digest = hashlib.sha256(repr(self.val_fraction).encode())
        for name in self.files:
            content = (self.root / name).read_bytes()
            digest.update(_bytes(f"\n{name}\n{hashlib.sha256(content).hexdigest()}"))
        return digest.hexdigest()

    def split_files(self, split: Split) -> list[str]:
        """Return the sorted relative paths of the files of one split.

        A .jsonl file is in both splits, because its lines are divided between them.
        """
        return [
            name
            for name in self.files
            if name.endswith(".jsonl") or split_of(name, self.val_fraction) == split
        ]

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the non-empty documents of the split."""
        for name in self.split_files(split):
            if name.endswith(".jsonl"):
                yield from self._lines(name, split)
            elif text := self._read(self.root / name):
                yield text

    def _read(self, path: Path) -> str:
        """Return the text of one file; bytes that are not UTF-8 are replaced."""
        return path.read_text(encoding="utf-8", errors="replace")

    def _lines(self, name: str, split: Split) -> Iterator[str]:
        with (self.root / name).open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file):
                if split_of(f"{name}:{number}", self.val_fraction) != split or not line.strip():
                    continue
                if text := _text_of(line, f"{self.root / name}: line {number + 1}"):
                    yield text


class StdlibCorpus(FilesCorpus):
    """The source code of this machine's Python standard library without its tests, one document
    per file.

    `root` is the folder to read, by default that of `sysconfig`. Raises ConfigError if it contains
    no source code.
    """

    name = "stdlib"

    def __init__(self, val_fraction: float, root: Path | None = None) -> None:
        self.val_fraction = val_fraction
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.files = sorted(
            name for name in _files(self.root, EXCLUDED_FOLDERS) if name.endswith(".py")
        )
        if not self.files:
            raise ConfigError(
                f"no Python source under {self.root}: install the standard library's .py files or"
                " use another interpreter"
            )

    def _read(self, path: Path) -> str:
        """Return the text of one file, decoded as Python source."""
        with tokenize.open(path) as file:
            return file.read()


def _text_of(line: str, where: str) -> str:
    """Return the text of a line of JSON, decoded with `surrogateescape`. Raises ConfigError where
    it has none, and for bytes or escapes that stand for no character.
    """
    if broken := _lone_surrogate(line):
        raise ConfigError(f"{where} is not UTF-8 (byte 0x{ord(broken) - 0xDC00:02x}): convert it")
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f'{where} is not a JSON object with a "text"')
    if broken := _lone_surrogate(text):
        raise ConfigError(
            f"{where} has \\u{ord(broken):04x}, half of a character: write whole characters"
        )
    return text


def _lone_surrogate(text: str) -> str:
    """Return the first character of `text` that UTF-8 cannot encode; empty where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


def _bytes(name: str) -> bytes:
    """Return the bytes of a file's name, which need not be UTF-8."""
    return name.encode(errors="surrogateescape")


def _files(root: Path, excluded: frozenset[str]) -> Iterator[str]:
    """Yield the relative POSIX path of every regular file, or link to one, below `root`.

    Skips `excluded` folders, and pipes and devices, which might never end.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        files = (Path(folder) / name for name in names)
        yield from (file.relative_to(root).as_posix() for file in files if file.is_file())
