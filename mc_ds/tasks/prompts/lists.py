"""RULER's tasks on whole lists: variable tracking, common words and frequent words.

    VariableTracking   lines such as `Let QKXVB = TRMPL.` in noise; which names have one value?
    CommonWords        a numbered list; ten words occur ten times as often as all others
    FrequentWords      coded words whose frequencies follow a zeta distribution; the top three?

Source: RULER (Hsieh et al., arXiv:2404.06654), its tasks for tracing and aggregation. As there, the
first two show a small solved example.
"""

import re
import string
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from mc_ds.config import ConfigError
from mc_ds.tasks.prompts.base import Prompt, PromptFamily
from mc_ds.tasks.prompts.page import Page, Tokens

NOISE_WORD = "..."
"""The most frequent word of `FrequentWords`, which does not count."""


class VariableTracking(PromptFamily):
    """Chains of variables, each assigned from the one before; the question asks for all variables
    of the first chain.
    """

    new_tokens: PositiveInt = 30
    hops: PositiveInt = 4
    """Number of assignments that copy a variable; a chain has one variable more."""
    chains: PositiveInt = 1
    """Number of chains; the question asks for one."""
    letters: PositiveInt = 5
    """Number of letters of a name."""

    def write(self, page: Page) -> Prompt:
        """Return a prompt whose haystack is noise."""
        names = self._names(page, (self.chains + 1) * (self.hops + 1))
        chains = np.array(names).reshape(self.chains + 1, self.hops + 1).tolist()
        drawn = page.rng.choice(90_000, self.chains + 1, replace=False) + 10_000
        values = [str(value) for value in drawn]
        shown = [*_assignments(chains[-1], values[-1])]
        example = "".join(shown) + _question(values[-1]) + f" {', '.join(chains[-1])}.\n"
        opening = page.encode(
            "Variables get their values from numbers or from other variables. Follow them and"
            f" answer the question.\n\nExample:\n{example}\nText:\n"
        )
        question = page.encode(_question(values[0]))
        texts = [[*_assignments(*pair)] for pair in zip(chains[:-1], values[:-1], strict=True)]
        numbers = self._interleaved(page)
        lines = page.encode_many([texts[chain][place] for chain, place in numbers])
        room = page.room(opening, question, *lines)
        tokens, spans = page.compose(opening, page.noise(room), question, lines)
        asked = np.array([chain == 0 for chain, _ in numbers])
        return Prompt(
            tokens,
            chains[0],
            question_tokens=len(question),
            spans=spans[asked],
            distractors=spans[~asked],
        )

    def _names(self, page: Page, count: int) -> list[str]:
        alphabet = list(string.ascii_uppercase)
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(page.rng.choice(alphabet, self.letters))] = None
        return [*names]

    def _interleaved(self, page: Page) -> list[tuple[int, int]]:
        """Return chain and place of every assignment, in a random order that keeps each chain's."""
        order = page.rng.permutation(np.repeat(np.arange(self.chains), self.hops + 1))
        done = [0] * self.chains
        numbers = []
        for chain in order.tolist():
            numbers.append((chain, done[chain]))
            done[chain] += 1
        return numbers


def _assignments(names: Sequence[str], value: str) -> Iterator[str]:
    """Yield a line for each variable of a chain."""
    for name, source in zip(names, [value, *names], strict=False):
        yield f"Let {name} = {source}.\n"


def _question(value: str) -> str:
    return (
        f"\nQuestion: Which variables have the value {value}, directly or through other variables?"
        "\nAnswer: These variables have the value"
        f" {value}:"
    )


class CommonWords(PromptFamily):
    """A numbered list of words in random order, a few of which are far more common than all others;
    the question asks for these.
    """

    new_tokens: PositiveInt = 120
    asked: PositiveInt = 10
    """Number of common words."""
    repeats: PositiveInt = 3
    """Number of times that each other word occurs. It is lowered where the common words would take
    more than half of the text, and raised where the corpus has too few words.
    """
    ratio: int = Field(default=10, ge=2)
    """Ratio of the frequencies of common and other words."""

    def write(self, page: Page) -> Prompt:
        """Return a prompt whose list is as long as fits; line breaks fill up the rest."""
        # An answer must not be an echo of what is said around the list.
        spoken = set(re.findall(r"[a-z]+", (self._instruction + self._question).lower()))
        words = np.array([word for word in page.words(4 * self.asked) if word not in spoken])
        common, shown, others = np.split(words, [self.asked, 2 * self.asked])
        example = self._example(page, shown.tolist(), others.tolist())
        opening = page.encode(f"{self._instruction}{example}\nText:\n")
        question = page.encode(self._question)
        room = page.room(opening, question)
        items = self._items(page, common.tolist(), others.tolist(), room)
        numbers = page.encode_many([f" {place}." for place in range(1, len(items) + 1)])
        pieces = [np.concatenate(pair) for pair in zip(numbers, items, strict=True)]
        rest = room - sum(map(len, pieces))
        tokens, _ = page.compose(opening, [page.padding(rest), *pieces], question, [])
        return Prompt(tokens, common.tolist(), question_tokens=len(question))

    @property
    def _instruction(self) -> str:
        return (
            f"Each text is a list of numbered words. Find its {self.asked} most common words.\n\n"
            "Example:\n"
        )

    @property
    def _question(self) -> str:
        return (
            f"\nQuestion: What are the {self.asked} most common words of this list?\n"
            f"Answer: The {self.asked} most common words are:"
        )

    def _example(self, page: Page, shown: Sequence[str], others: Sequence[str]) -> str:
        """Return a short list with its answer."""
        listed = page.rng.permutation([*shown, *shown, *others[: self.asked // 2]])
        items = "".join(f" {place}. {word}" for place, word in enumerate(listed, start=1))
        answer = "".join(f" {place}. {word}" for place, word in enumerate(shown, start=1))
        return f"{items}{self._question}{answer}\n"

    def _items(
        self, page: Page, common: Sequence[str], others: Sequence[str], room: int
    ) -> list[Tokens]:
        """Return the tokens of the list's words in random order, as many as fit into `room` with
        their numbers.
        """
        asked = page.encode_many([f" {word}" for word in common])
        rest = page.encode_many([f" {word}" for word in others])
        sizes = np.cumsum([len(word) for word in rest])
        listed = page.encode_many([f" {place}." for place in range(1, room // 2)])
        numbers = np.cumsum([0, *map(len, listed)])

        def length(repeats: int, count: int) -> int:
            """Return the tokens of a list with `count` other words."""
            items = repeats * (self.ratio * self.asked + count)
            if items >= len(numbers):
                return room + 1
            of_common = self.ratio * sum(map(len, asked))
            of_others = int(sizes[count - 1]) if count else 0
            return int(numbers[items]) + repeats * (of_common + of_others)

        repeats = self.repeats
        while repeats > 1 and length(repeats, 0) > room // 2:
            repeats -= 1
        while length(repeats, len(rest)) <= room:
            repeats += 1
        count = bisect_right(range(len(rest) + 1), room, key=lambda n: length(repeats, n)) - 1
        if count < self.asked:
            raise ConfigError(
                f"{page.length} tokens are too few: they hold {max(count, 0)} words besides the"
                f" common ones, at least {self.asked} are needed: use a longer history"
            )
        words = [word for word in asked for _ in range(repeats * self.ratio)]
        words += [word for word in rest[:count] for _ in range(repeats)]
        return [words[number] for number in page.rng.permutation(len(words))]


class FrequentWords(PromptFamily):
    """Coded words in random order. The frequency of the word of rank k is proportional to
    k ** -alpha; that of rank 1 is noise, and the question asks for the next ones.
    """

    new_tokens: PositiveInt = 50
    asked: PositiveInt = 3
    """Number of words asked for."""
    alpha: float = Field(default=2.0, gt=1)
    """Exponent of the zeta distribution."""
    letters: PositiveInt = 6
    """Number of letters of a word."""

    def write(self, page: Page) -> Prompt:
        """Return a prompt with as many words as fit; line breaks fill up the rest."""
        opening = page.encode(
            "The text below is in code. Count how often each coded word occurs, and ignore the dots"
            f" ({NOISE_WORD}).\n\nText:\n"
        )
        question = page.encode(
            f"\nQuestion: What are the {self.asked} most frequent coded words of the text above?\n"
            f"Answer: The {self.asked} most frequent coded words are:"
        )
        room = page.room(opening, question)
        words = self._words(page, len(self.counts(room)) - 1)
        tokens_of = page.encode_many([f" {word}" for word in (NOISE_WORD, *words)])
        sizes = np.array([len(word) for word in tokens_of])

        def length(total: int) -> int:
            counts = self.counts(total)
            return int(counts @ sizes[: len(counts)])

        counts = self.counts(bisect_right(range(room + 1), room, key=length) - 1)
        top = counts[: self.asked + 2]
        if len(top) < self.asked + 2 or (np.diff(top) >= 0).any():
            raise ConfigError(
                f"{page.length} tokens are too few: the {self.asked} most frequent words do not"
                " stand out: use a longer history"
            )
        numbers = page.rng.permutation(np.repeat(np.arange(len(counts)), counts))
        pieces = [tokens_of[number] for number in numbers]
        rest = room - sum(map(len, pieces))
        tokens, _ = page.compose(opening, [page.padding(rest), *pieces], question, [])
        return Prompt(tokens, words[: self.asked], question_tokens=len(question))

    def counts(self, total: int) -> NDArray[np.int64]:
        """Return the expected frequencies among `total` words, rounded, by rank; ranks from the
        first that rounds to 0 on are left out.
        """
        ranks = np.arange(1, total + 2)
        expected = total * ranks**-self.alpha / zeta(self.alpha)
        counts = np.rint(expected).astype(np.int64)
        return counts[counts > 0]

    def _words(self, page: Page, count: int) -> list[str]:
        """Draw distinct words of random letters."""
        alphabet, words = list(string.ascii_lowercase), dict[str, None]()
        while len(words) < count:
            words["".join(page.rng.choice(alphabet, self.letters))] = None
        return [*words]


def zeta(exponent: float) -> float:
    """Return Riemann's zeta function for an exponent above 1: the sum of the first terms, and the
    Euler-Maclaurin estimate of the others.
    """
    terms = 64
    head = float((np.arange(1, terms, dtype=np.float64) ** -exponent).sum())
    rest = terms ** (1 - exponent) / (exponent - 1) + terms**-exponent / 2
    return head + rest + exponent * terms ** (-exponent - 1) / 12
