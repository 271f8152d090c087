"""Text corpora: the documents of each split, and a fingerprint of all of them."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Protocol

from mc_ds.config.errors import ConfigError
from mc_ds.data.text.documents import document
from mc_ds.data.text.faults import Fault
from mc_ds.data.text.plan import InputFile, form_of
from mc_ds.data.text.readers import Segment, segments

Split = Literal["train", "val"]

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
"""Folders of the standard library that contain tests or installed packages."""
MAX_RECORD_BYTES = 64_000_000
"""Maximum size of a line or row, as by default in `tools/prepare_data.py`."""


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
    """Return a document's split, by a hash of its name, so that adding documents moves no
    others.
    """
    digest = hashlib.sha256(_bytes(name)).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


class FilesCorpus:
    """Text files below the folder `root`: one document per file, or per line of .jsonl and row of
    .parquet (the field "text"). They are read as by `tools/prepare_data.py`.

    `patterns` are shell patterns of file names, or of paths below `root` (`docs/*.md`). Raises
    ConfigError if no file matches, or if a file is not valid text (naming file and line).
    """

    name = "files"
    reading = "2 "
    """Part of the fingerprint, changed whenever the same files would give different documents."""

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
        digest = hashlib.sha256(f"{self.reading}{self.val_fraction!r}".encode())
        for name in self.files:
            content = (self.root / name).read_bytes()
            digest.update(_bytes(f"\n{name}\n{hashlib.sha256(content).hexdigest()}"))
        return digest.hexdigest()

    def split_files(self, split: Split) -> list[str]:
        """Return the sorted relative paths of the files of one split.

        A .jsonl or .parquet file is in both splits, because its records are divided between them.
        """
        return [
            name
            for name in self.files
            if self._of_records(name) or split_of(name, self.val_fraction) == split
        ]

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the non-empty documents of the split."""
        for name in self.split_files(split):
            if self._of_records(name):
                yield from self._records(name, split)
            elif text := self._read(self.root / name):
                yield text

    def _of_records(self, name: str) -> bool:
        form = form_of(name)
        return form is not None and form[0] != "text"

    def _read(self, path: Path) -> str:
        """Return the text of one file."""
        return b"".join(filter(None, _contents(path))).decode()

    def _records(self, name: str, split: Split) -> Iterator[str]:
        for number, content in enumerate(_contents(self.root / name)):
            if content and split_of(f"{name}:{number}", self.val_fraction) == split:
                yield content.decode()


class StdlibCorpus(FilesCorpus):
    """The source code of this machine's Python standard library without its tests, one document
    per file.

    `root` is the folder to read, by default that of `sysconfig`. Raises ConfigError if it contains
    no source code.
    """

    name = "stdlib"
    reading = ""

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


def _bytes(name: str) -> bytes:
    """Return the bytes of a file name, which may not be UTF-8."""
    return name.encode(errors="surrogateescape")


def _files(root: Path, excluded: frozenset[str]) -> Iterator[str]:
    """Yield the relative POSIX path of every regular file, or link to one, below `root`.

    Skips `excluded` folders, and pipes and devices, which might never end.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        files = (Path(folder) / name for name in names)
        yield from (file.relative_to(root).as_posix() for file in files if file.is_file())


def _contents(path: Path) -> Iterator[bytes | None]:
    """Yield the text of every record of a file as UTF-8; None for a blank line.

    A file with an unknown suffix is read as plain text. Raises ConfigError for invalid text.
    """
    form, compression = form_of(path.name) or ("text", "")
    file = InputFile(str(path), path, form, compression, 0)
    try:
        for found in segments(0, file, text_field="text", max_bytes=MAX_RECORD_BYTES):
            if not isinstance(found, Segment):
                raise Fault(
                    "too large", f"{found.where}: larger than {MAX_RECORD_BYTES // 10**6} MB"
                )
            for number in range(len(found.records)):
                yield document(found, number, "text")
    except Fault as fault:
        if fault.reason == "empty":
            return
        raise ConfigError(
            f"{fault}; fix it, exclude it with data.patterns, or make a dataset with"
            " tools/prepare_data.py --on_error skip"
        ) from None
