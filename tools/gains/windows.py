"""Draws windows of tokens from documents.

A source is a split, a kind of text and a file pattern. Files too small for a window are skipped, or
joined with the following files of their folder. One window is drawn from each document.
"""

import glob
import gzip
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_ds.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A source of documents of one kind, for one split."""

    split: str
    kind: str
    limit: int
    """Maximum number of windows."""
    join: bool
    """Whether to join the files of a folder to one document."""
    pattern: str
    """Glob pattern of files; may contain `**`."""


@dataclass(frozen=True)
class Windows:
    """Windows of N documents."""

    ids: NDArray[np.uint16]
    """[N, T + 1] token ids; the last is only a label."""
    split: NDArray[np.str_]
    kind: NDArray[np.str_]
    name: NDArray[np.str_]

    def save(self, path: Path) -> None:
        """Write to an .npz file."""
        np.savez_compressed(path, ids=self.ids, split=self.split, kind=self.kind, name=self.name)

    def of(self, split: str) -> NDArray[np.intp]:
        """Return the indices of the windows of a split."""
        return np.flatnonzero(self.split == split)


def load_windows(path: Path) -> Windows:
    """Read what `Windows.save` wrote."""
    with np.load(path) as file:
        return Windows(file["ids"], file["split"], file["kind"], file["name"])


def parse_source(text: str) -> Source:
    """Parse `split,kind,limit[,join]:pattern`. Raises ValueError for any other form."""
    head, colon, pattern = text.partition(":")
    fields = head.split(",")
    if not colon or len(fields) not in (3, 4) or fields[3:] not in ([], ["join"]):
        raise ValueError(f"--source {text!r}: should have the form split,kind,limit[,join]:pattern")
    return Source(fields[0], fields[1], int(fields[2]), len(fields) == 4, pattern)


def draw_windows(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    characters: tuple[int, int],
    seed: int,
) -> Windows:
    """Draw one window of T + 1 tokens from each document whose length is within `characters`."""
    rng = random.Random(seed)
    found: list[tuple[NDArray[np.uint16], Source, str]] = []
    for source in sources:
        texts = list(documents(source, characters))
        rng.shuffle(texts)
        taken = 0
        for name, text in texts:
            if taken == source.limit:
                break
            ids = tokenizer.encode(text)
            if len(ids) > seq_len:
                first = rng.randrange(len(ids) - seq_len)
                window = np.array(ids[first : first + seq_len + 1], dtype=np.uint16)
                found.append((window, source, name))
                taken += 1
    return Windows(
        np.stack([window for window, _, _ in found]),
        np.array([source.split for _, source, _ in found]),
        np.array([source.kind for _, source, _ in found]),
        np.array([name for _, _, name in found]),
    )


def documents(source: Source, characters: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each document of a source.

    Files outside of `characters` (minimum, maximum) are skipped; with `join`, documents are cut at
    the maximum instead.
    """
    least, most = characters
    pieces: list[str] = []
    folder = None
    for path in sorted(Path(name) for name in glob.glob(source.pattern, recursive=True)):
        if not path.is_file():
            continue
        text = read_text(path)
        if source.join and path.parent == folder:
            pieces.append(text)
        else:
            pieces, folder = [text], path.parent
        size = sum(map(len, pieces))
        if least <= size and (source.join or size <= most):
            yield str(path), "\n".join(pieces)[:most]
            pieces = []


def read_text(path: Path) -> str:
    """Return the text of a file, which may be compressed with gzip."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            return file.read()
    return path.read_text(encoding="utf-8", errors="replace")
