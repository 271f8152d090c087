"""`TaskVocabulary`: the token ids of planted facts, taken from the run's tokenizer."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.tokenizer import Tokenizer

NUM_KEYS = 128
"""Default number of token ids that keys are made of."""
_RESERVED = frozenset(string.ascii_lowercase + string.digits + "=?")


class Paraphrase(NamedTuple):
    """A planted word, and an expression with the same meaning and other tokens that asks for it."""

    planted: NDArray[np.int64]
    asked: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TaskVocabulary:
    """The token ids that facts and questions consist of."""

    letters: NDArray[np.int64]
    """[26]: the letters a to z, which make up values."""
    equals: int
    """Token between a key and its value."""
    question: int
    """Token that starts the question."""
    newline: int
    """Token that ends the question."""
    keys: NDArray[np.int64]
    """[num_keys]: the ids that make up keys, best first, so that a smaller alphabet is a prefix of
    a larger one.
    """
    paraphrases: Sequence[Sequence[Paraphrase]] = ()
    """By meaning, its paraphrases; empty for tasks that ask for a fact by its key."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        num_keys: int = NUM_KEYS,
        paraphrases: Sequence[Sequence[Paraphrase]] = (),
    ) -> "TaskVocabulary":
        """Return the ids in `tokenizer`'s vocabulary. Raises ConfigError if fewer than `num_keys`
        pieces are suitable for keys.
        """
        candidates = _key_candidates(tokenizer)
        if not 1 <= num_keys <= len(candidates):
            raise ConfigError(
                f"num_keys = {num_keys}: {len(candidates)} of the {tokenizer.vocab_size} pieces of"
                f" this vocabulary can serve as keys: use 1 to {len(candidates)}, longer keys or"
                " a larger data.vocab_size"
            )
        letters = np.array(
            [tokenizer.single(letter) for letter in string.ascii_lowercase], dtype=np.int64
        )
        equals, question, newline = (tokenizer.single(mark) for mark in "=?\n")
        keys = np.array(candidates[:num_keys], dtype=np.int64)
        return cls(letters, equals, question, newline, keys, paraphrases)


def _key_candidates(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that may occur in keys, best first.

    Excluded are line breaks, blanks and the other tokens of facts. Pieces of two or more letters
    come first, and among them those learned last, which are rare in text. Pieces that begin with a
    space come later: without a space, keys read the same wherever they are placed.
    """
    plain: list[int] = []
    rest: list[int] = []
    for token, text in reversed(tokenizer.learned_pieces()):
        if text in _RESERVED or not text.strip() or "\n" in text:
            continue
        (plain if len(text) > 1 and text.isalpha() else rest).append(token)
    return plain + rest
