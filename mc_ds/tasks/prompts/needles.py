"""`Needles`: RULER's needles in a haystack. Lines say the secret of a name; the question asks for
the secrets of one or several names.

    haystack  noise (one line repeated), text (the corpus), or needles (lines about other names)
    names     two words, or a UUID
    secrets   a number of seven digits, or a UUID

Source: RULER (Hsieh et al., arXiv:2404.06654), its eight retrieval tasks.
"""

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

import numpy as np
from pydantic import PositiveInt, model_validator

from mc_ds.tasks.prompts.base import Prompt, PromptFamily
from mc_ds.tasks.prompts.page import Page, Tokens

DIGITS = 7
FEWEST_WORDS = 32
"""Fewer words than this give too few names."""
FEWEST_TOKENS = 16
"""Fewer tokens than this hold no needle."""


class Needles(PromptFamily):
    """Names with secrets, hidden in a haystack."""

    haystack: Literal["noise", "text", "needles"] = "text"
    names: Literal["words", "uuids"] = "words"
    secrets: Literal["numbers", "uuids"] = "numbers"
    keys: PositiveInt = 1
    """Number of names in the text, besides those of the haystack."""
    values: PositiveInt = 1
    """Number of secrets per name."""
    asked: PositiveInt = 1
    """Number of names that the question asks for."""

    @model_validator(mode="after")
    def _check(self) -> "Needles":
        if self.asked > self.keys:
            raise ValueError(f"asked = {self.asked} must be at most keys = {self.keys}")
        return self

    def write(self, page: Page) -> Prompt:
        """Return a prompt that asks for the first names."""
        names, secrets = self._names(page, self.keys), self._secrets(page, self.keys * self.values)
        needles = [(names[number // self.values], secret) for number, secret in enumerate(secrets)]
        opening, question = page.encode(self._opening()), page.encode(self._question(names))
        lines = page.encode_many([self._line(*needle) for needle in needles])
        room = page.room(opening, question, *lines)
        order = page.rng.permutation(len(lines))
        tokens, places = page.compose(
            opening, self._haystack(page, room, names), question, [lines[i] for i in order]
        )
        place = np.argsort(order)  # of each needle among the lines
        spans = places[place]
        needed = self.asked * self.values
        said = sorted(range(needed), key=lambda i: (i // self.values, place[i]))
        return Prompt(
            tokens,
            answers=[secrets[number] for number in said],
            question_tokens=len(question),
            spans=_sorted(spans[:needed]),
            distractors=_sorted(spans[needed:]),
        )

    def _haystack(self, page: Page, room: int, names: Sequence[str]) -> list[Tokens]:
        """Return a haystack of `room` tokens that says nothing about `names`."""
        if self.haystack == "noise":
            return page.noise(room)
        if self.haystack == "text":
            return page.text(room)
        pieces: list[Tokens] = []
        taken, left, longest = set(names), room, FEWEST_TOKENS
        while left > longest:
            drawn = [name for name in self._names(page, left // longest) if name not in taken]
            taken |= set(drawn)
            needles = zip(drawn, self._secrets(page, len(drawn)), strict=True)
            lines = page.encode_many([self._line(*needle) for needle in needles])
            longest = max([longest, *map(len, lines)])
            fitting = int((np.cumsum([len(line) for line in lines]) <= left).sum())
            pieces += lines[:fitting]
            left = room - sum(map(len, pieces))
        return [*page.noise(left), *pieces]

    def _names(self, page: Page, count: int) -> list[str]:
        if self.names == "uuids":
            return [_uuid(page) for _ in range(count)]
        words = page.words(FEWEST_WORDS)
        pairs = page.rng.choice(len(words) ** 2, min(count, len(words)), replace=False)
        return [f"{words[pair // len(words)]}-{words[pair % len(words)]}" for pair in pairs]

    def _secrets(self, page: Page, count: int) -> list[str]:
        if self.secrets == "uuids":
            return [_uuid(page) for _ in range(count)]
        least = 10 ** (DIGITS - 1)
        drawn = page.rng.choice(9 * least, count, replace=False)
        return [str(least + number) for number in drawn]

    @property
    def _kind(self) -> str:
        return "number" if self.secrets == "numbers" else "code"

    def _opening(self) -> str:
        return (
            f"The text below mentions secret {self._kind}s. Read it with care: a question about"
            " them follows.\n\n"
        )

    def _line(self, name: str, secret: str) -> str:
        before = "\n" if self.haystack == "text" else ""
        return f"{before}The secret {self._kind} of {name} is {secret}.\n"

    def _question(self, names: Sequence[str]) -> str:
        of = _listed(names[: self.asked])
        several = self.asked * self.values > 1
        what, are = (f"{self._kind}s", "are") if several else (self._kind, "is")
        every = "all " if self.values > 1 else ""
        return (
            f"\nQuestion: What {are} {every}the secret {what} of {of} in the text above?\n"
            f"Answer: The secret {what} of {of} {are}"
        )


def _listed(names: Sequence[str]) -> str:
    """Return the names as an enumeration: `a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


def _uuid(page: Page) -> str:
    return str(UUID(bytes=page.rng.bytes(16), version=4))


def _sorted(spans: Tokens) -> Tokens:
    return spans[np.argsort(spans[:, 0])]
