"""Joins the pages of a package to long documents of clean text."""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

from gathering.packages import Source

LONGEST = 1_000_000
"""Maximum characters of a document; longer ones are cut."""
SKIPPED = {"script", "style", "nav", "head", "noscript", "svg"}
BLOCKS = {"p", "div", "li", "tr", "br", "pre", "section", "summary", "dt", "dd", "blockquote"}
BLOCKS |= {f"h{level}" for level in range(1, 7)}


def documents(source: Source, root: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of each document: the pages of one folder, in the order of names, joined
    and cut at LONGEST.
    """
    common = root / source.pages.split("*")[0].rpartition("/")[0]
    paths = [
        path
        for path in sorted(root.glob(source.pages))
        if path.relative_to(common).parts[0] not in source.left_out
    ]
    for folder, pages in groupby(paths, key=lambda path: _folder(path, common, source.depth)):
        texts = (clean(read(path), source) for path in pages)
        for number, text in enumerate(_joined(texts)):
            title = f"{source.name} {folder}".strip()
            yield (f"{title} ({number + 1})" if number else title), text


def read(path: Path) -> str:
    """Return the text of a page, which may be compressed, in UTF-8 or Latin-1."""
    content = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        content = gzip.decompress(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def clean(text: str, source: Source) -> str:
    """Return a page's text without markup and surplus blank lines."""
    if source.cleaning == "html":
        page = _Page()
        page.feed(text)
        text = "".join(page.parts)
    elif source.cleaning == "wordnet":
        text = "\n".join(_wordnet(text))
    lines = (line.rstrip() for line in text.replace("\0", "").splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _folder(path: Path, common: Path, depth: int) -> str:
    return "/".join(path.relative_to(common).parts[:-1][:depth])


def _joined(texts: Iterator[str]) -> Iterator[str]:
    """Join texts, and cut the result after the last line break before LONGEST."""
    joined = ""
    for text in filter(None, texts):
        joined = f"{joined}\n\n{text}" if joined else text
        while len(joined) > LONGEST:
            end = joined.rfind("\n", 0, LONGEST) + 1 or LONGEST
            yield joined[:end]
            joined = joined[end:]
    if joined.strip():
        yield joined


def _wordnet(text: str) -> Iterator[str]:
    """Yield "word, word: meaning" for each entry of a WordNet data file."""
    for line in text.splitlines():
        facts, bar, meaning = line.partition(" | ")
        fields = facts.split()
        if bar and len(fields) > 4 and fields[0].isdigit():
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield f"{', '.join(words).replace('_', ' ')}: {meaning.strip()}"


class _Page(HTMLParser):
    """Collects a page's text, one line per block; preformatted text is unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in SKIPPED
        self._preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = max(0, self._skipped - (tag in SKIPPED))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))
