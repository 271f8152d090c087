"""`Page`: composes a text of an exact number of tokens.

    separator | opening | body: pieces of a haystack, with lines inserted between them | question

Every part is encoded by itself, so lengths add up and the place of each line is known. `TextSource`
provides the corpus as haystack and its words.

Legend: N tokens of the page, n lines.
"""

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError
from mc_ds.data import Domain
from mc_ds.data.tokenizer import Tokenizer

Tokens = NDArray[np.int64]
WORDS_FROM = 1 << 20
"""Number of tokens of each text that are searched for words."""
LEAST_PIECES = 16
"""Smallest number of places at which something can be inserted into a text."""
NOISE = (
    "Rain fell on the roofs of the town. A clock ticked in an empty hall. The wind turned a page."
    " Nobody was in a hurry that day.\n"
)
"""A haystack that says nothing, of this line alone."""
_WORD = re.compile(r"(?<![A-Za-z_])[a-z]{4,10}(?![A-Za-z_])")


class TextSource:
    """The text of several domains, drawn in the shares of their weights."""

    def __init__(self, tokenizer: Tokenizer, domains: Sequence[Domain]) -> None:
        self.tokenizer = tokenizer
        self._shards = [domain.shards for domain in domains]
        weights = np.array([domain.weight for domain in domains])
        self._shares = weights / weights.sum()

    @property
    def digests(self) -> list[str]:
        """Digests of the text."""
        return [shard.sha256 for shards in self._shards for shard in shards.index.shards]

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(map(len, self._shards))

    @cached_property
    def words(self) -> list[str]:
        """The distinct words of 4 to 10 lower-case letters at the beginning of each text, in the
        order of the alphabet.
        """
        found: set[str] = set()
        for shards in self._shards:
            tokens = shards.window(0, min(len(shards), WORDS_FROM))
            found |= set(_WORD.findall(self.tokenizer.decode(tokens)))
        return sorted(found)

    @cached_property
    def line_breaks(self) -> Tokens:
        """The tokens whose text begins with a line break."""
        learned = [token for token, text in self.tokenizer.learned_pieces() if text[:1] == "\n"]
        return np.array([self.tokenizer.single("\n"), *learned], dtype=np.int64)

    def text(self, rng: np.random.Generator, count: int) -> Tokens:
        """Return `count` consecutive tokens from a random place; a shorter text is repeated.
        Separators of documents become line breaks.
        """
        shards = self._shards[int(rng.choice(len(self._shards), p=self._shares))]
        length = min(count, len(shards))
        start = int(rng.integers(len(shards) - length, endpoint=True))
        tokens = np.resize(shards.window(start, length), count)
        tokens[tokens == self.tokenizer.separator_id] = self.tokenizer.single("\n")
        return tokens


class Page:
    """A text of exactly `length` tokens that is being composed. `rng` makes all random choices."""

    def __init__(self, source: TextSource, length: int, rng: np.random.Generator) -> None:
        self.source, self.length, self.rng = source, length, rng
        self._tokenizer = source.tokenizer
        self.newline = self._tokenizer.single("\n")

    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`."""
        return np.array(self._tokenizer.encode(text), dtype=np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text."""
        encoded = self._tokenizer.encode_many(texts, threads=1)
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def room(self, *parts: Tokens) -> int:
        """Return the number of tokens that `parts` and the separator leave. Raises ConfigError if
        it is less than half of the page.
        """
        needed = 1 + sum(map(len, parts))
        if 2 * needed > self.length:
            raise ConfigError(
                f"{self.length} tokens are too few: instructions, question and facts take {needed}"
                f" of them: use at least {2 * needed}"
            )
        return self.length - needed

    def words(self, least: int) -> list[str]:
        """Return the words of the corpus in random order. Raises ConfigError if there are fewer
        than `least`.
        """
        words = self.source.words
        if len(words) < least:
            raise ConfigError(
                f"the corpus has only {len(words)} different words of 4 to 10 letters, but {least}"
                " are needed: use a larger corpus (--data_root)"
            )
        return [words[number] for number in self.rng.permutation(len(words))]

    def noise(self, room: int) -> list[Tokens]:
        """Return a haystack of `room` tokens that repeats `NOISE`, its first line cut to fit."""
        line = self.encode(NOISE)
        whole, rest = divmod(room, len(line))
        return [line[len(line) - rest :], *([line] * whole)]

    def text(self, room: int) -> list[Tokens]:
        """Return a haystack of `room` tokens of the corpus, in pieces that begin with a line break.
        Where there are few of these, the text is cut at equal distances. Lines between the pieces
        need a line break at both ends.
        """
        tokens = self.source.text(self.rng, room)
        breaks = np.flatnonzero(np.isin(tokens[1:], self.source.line_breaks)) + 1
        if len(breaks) < LEAST_PIECES:
            breaks = np.linspace(0, room, LEAST_PIECES, dtype=np.int64)[1:-1]
        return np.split(tokens, breaks)

    def padding(self, count: int) -> Tokens:
        """Return `count` line breaks."""
        return np.full(count, self.newline, dtype=np.int64)

    def compose(
        self, opening: Tokens, pieces: Sequence[Tokens], question: Tokens, lines: Sequence[Tokens]
    ) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the tokens of the page [N], and the token ranges [n, 2] of `lines`, which stand
        in this order at random places between the pieces.
        """
        places = np.sort(self.rng.integers(len(pieces), size=len(lines), endpoint=True))
        parts: list[Tokens] = [np.array([self._tokenizer.separator_id]), opening]
        spans, written, done = [], 1 + len(opening), 0
        for line, place in zip(lines, places, strict=True):
            before = pieces[done:place]
            written, done = written + sum(map(len, before)), int(place)
            spans.append((written, written + len(line)))
            parts += [*before, line]
            written += len(line)
        tokens = np.concatenate([*parts, *pieces[done:], question]).astype(np.int64)
        assert len(tokens) == self.length
        return tokens, np.array(spans, dtype=np.int64).reshape(-1, 2)
