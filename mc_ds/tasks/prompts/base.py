"""`Prompt`: a text that ends with a question, its answers, and how a continuation is scored.

Legend: N tokens, n facts.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from mc_ds.config.errors import Settings
from mc_ds.data.sampling.windows import derive_key
from mc_ds.tasks.base import errors_of, no_spans
from mc_ds.tasks.prompts.page import Page, TextSource

SLACK = 8
"""Tokens that a continuation may have beyond those of its answers, where a tokenizer needs more
than a task's limit for them.
"""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text, and what its continuation should contain."""

    tokens: NDArray[np.int64]
    """[N], with the question at the end."""
    answers: Sequence[str]
    """Strings that a complete continuation contains, if possible in an order that can be known: of
    the question, else of the text.
    """
    wrong: Sequence[str] = ()
    """Answers to other questions: a continuation with one of these words scores 0."""
    max_new_tokens: int = 0
    """Number of tokens to generate."""
    stop: Sequence[str] = ()
    """Strings that end the answer."""
    question_tokens: int = 0
    """Number of tokens of the question."""
    spans: NDArray[np.int64] = field(default_factory=no_spans)
    """[n, 2] half-open token ranges of the facts needed for the answers, in the order of the text;
    n is 0 if the answers depend on the whole text.
    """
    distractors: NDArray[np.int64] = field(default_factory=no_spans)
    """[m, 2] token ranges of the other facts."""


def score(prompt: Prompt, continuation: str) -> float:
    """Return the share of the answers that occur in the continuation, in 0..1, ignoring case.

    Without `wrong` words this is RULER's score. With them, as for a choice among candidates, the
    first sentence must not name another one.
    """
    text = continuation
    for stop in prompt.stop:
        text = text.partition(stop)[0]
    text = text.lower()
    if any(re.search(rf"\b{re.escape(word.lower())}\b", text) for word in prompt.wrong):
        return 0.0
    return sum(answer.lower() in text for answer in prompt.answers) / len(prompt.answers)


class PromptFamily(Settings, ABC):
    """A kind of prompt. A new one needs only `write` and a name in the catalog."""

    new_tokens: PositiveInt = 128
    """Number of tokens to generate; more where the tokenizer needs more for the answers."""

    @abstractmethod
    def write(self, page: Page) -> Prompt:
        """Return a prompt of `page.length` tokens; `max_new_tokens` is set by the task. Raises
        ConfigError if that is too few.
        """


class PromptTask:
    """Prompts of one family over a text, at any length."""

    def __init__(self, name: str, family: PromptFamily, source: TextSource, *, seed: int) -> None:
        self.name, self.family, self.source = name, family, source
        names = "\n".join([name, *source.digests])
        digest = int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "big")
        self.key = derive_key(seed, digest)

    def prompt(self, index: int, length: int) -> Prompt:
        """Return prompt `index` >= 0 of exactly `length` tokens: a pure function of both, the seed,
        the task's name and the text. Raises ConfigError if the length is too small.
        """
        rng = np.random.default_rng(derive_key(self.key, length, index))
        page = Page(self.source, length, rng)
        with errors_of(self.name):
            prompt = self.family.write(page)
        answer = len(page.encode(" " + ", ".join(prompt.answers)))
        count = max(self.family.new_tokens, answer + SLACK)
        return replace(prompt, max_new_tokens=count)
