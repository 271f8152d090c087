"""Lists the files to read, given the inputs that a user names.

The suffix, in any case, decides how a file is read. In folders, names that begin with a dot are
skipped, links are followed, and each real file is read once, in the order of names.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mc_ds.config.errors import ConfigError
from mc_ds.data.manifest import SourceFacts
from mc_ds.data.text.faults import in_words
from mc_ds.storage import reason

Form = Literal["text", "json", "parquet"]
Compression = Literal["", ".gz", ".zst"]
FORMS: dict[str, Form] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
COMPRESSIONS: tuple[Compression, ...] = (".gz", ".zst")
STDIN = "-"


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    name: str
    """Path for messages: the input as given, plus the path below it."""
    path: Path
    form: Form
    compression: Compression
    size: int
    """Bytes as stored; 0 for standard input."""


@dataclass
class Plan:
    """The files to read, in order."""

    files: list[InputFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files and folders of the inputs that will not be read, by reason."""
    sources: list[SourceFacts] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Total bytes as stored."""
        return sum(file.size for file in self.files)


def suffixes() -> str:
    """Return the supported suffixes as a phrase for messages."""
    return f"{' '.join(FORMS)}, each also with {' or '.join(COMPRESSIONS)}"


def form_of(name: str) -> tuple[Form, Compression] | None:
    """Return a file's form and compression by its suffixes; None for an unknown suffix."""
    stem, suffix = os.path.splitext(name.lower())
    compression: Compression = next((known for known in COMPRESSIONS if known == suffix), "")
    form = FORMS.get(os.path.splitext(stem)[1] if compression else suffix)
    return None if form is None else (form, compression)


def make_plan(inputs: Sequence[str], *, stdin_suffix: str = ".txt") -> Plan:
    """List the files of `inputs`: files, folders, glob patterns, and `-` for standard input, which
    is read like a file with suffix `stdin_suffix`.

    Raises ConfigError if an input is missing, is neither file nor folder, or has an unknown
    suffix, or if there is nothing to read.
    """
    plan, seen = Plan(), set[tuple[int, int]]()
    for given in inputs:
        before = len(plan.files)
        if given == STDIN:
            plan.files.append(_standard_input(stdin_suffix))
        else:
            for path in _matches(given):
                _add(plan, path, seen)
        files = plan.files[before:]
        size = sum(file.size for file in files)
        plan.sources.append(SourceFacts(name=given, files=len(files), bytes=size))
    if not plan.files:
        raise ConfigError(
            f"{' '.join(inputs)}: nothing to read (skipped: {in_words(plan.skipped) or 'nothing'}):"
            f" give files that end in {suffixes()}"
        )
    return plan


def _standard_input(suffix: str) -> InputFile:
    form = form_of(f"stdin{suffix}")
    if form is None or form[0] == "parquet":
        raise ConfigError(
            f"--stdin {suffix}: not supported for standard input: use .txt or .jsonl, also with .gz"
            " or .zst"
        )
    return InputFile("standard input", Path("/dev/stdin"), *form, 0)


def _matches(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.exists() or not glob.has_magic(given):
        return [path]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise ConfigError(f"{given} matches no file: give another pattern, a file or a folder")
    return [Path(name) for name in found]


def _add(plan: Plan, path: Path, seen: set[tuple[int, int]]) -> None:
    """Add a file, or the files of a folder."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}: give a file, a folder or a pattern"
        ) from None
    if stat.S_ISDIR(status.st_mode):
        for found in _walk(path, plan.skipped, seen):
            _add_file(plan, found, found.stat(), seen)
    elif not stat.S_ISREG(status.st_mode):
        raise ConfigError(
            f"{path} is a pipe or a device: give a file, or give - and pipe into standard input"
        )
    elif form_of(path.name) is None:
        raise ConfigError(f"{path} has an unknown suffix: should be one of {suffixes()}")
    else:
        _add_file(plan, path, status, seen)


def _add_file(plan: Plan, path: Path, status: os.stat_result, seen: set[tuple[int, int]]) -> None:
    form = form_of(path.name)
    if form is None:
        plan.skipped["unknown suffix"] += 1
    elif (identity := (status.st_dev, status.st_ino)) in seen:
        plan.skipped["repeated file"] += 1
    else:
        seen.add(identity)
        plan.files.append(InputFile(str(path), path, *form, status.st_size))


def _walk(folder: Path, skipped: Counter[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the regular files below a folder. Follows links; enters every real folder once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        skipped["repeated folder"] += 1
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(
            f"a folder cannot be read: {reason(error)}: change its permissions, or give other"
            " inputs"
        ) from None
    for entry in entries:
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif entry.is_dir():
            yield from _walk(Path(entry.path), skipped, seen)
        elif entry.is_file():
            yield Path(entry.path)
        else:
            skipped["not a regular file" if os.path.exists(entry.path) else "broken link"] += 1
