"""`TaskVocabulary`: the token ids that planted facts are written with, from the run's own
tokenizer.
"""

import string
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.tokenizer import Tokenizer

NUM_KEYS = 128
"""Key pieces by default."""
_RESERVED = frozenset(string.ascii_lowercase + string.digits + "=?")


@dataclass(frozen=True, eq=False)
class TaskVocabulary:
    """Token ids that facts and questions are written with."""

    letters: NDArray[np.int64]
    """[26]: the letters a to z, of which values consist."""
    equals: int
    """Token between a key and its value."""
    question: int
    """Token that starts the question."""
    newline: int
    """Token that ends the question."""
    keys: NDArray[np.int64]
    """[num_keys]: the pieces of which keys consist, best first, so that a smaller alphabet is a
    prefix of a larger one.
    """

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_keys: int = NUM_KEYS) -> "TaskVocabulary":
        """Return the ids in `tokenizer`'s vocabulary. Raises ConfigError where it has fewer than
        `num_keys` pieces fit for keys.
        """
        candidates = _key_candidates(tokenizer)
        if not 1 <= num_keys <= len(candidates):
            raise ConfigError(
                f"num_keys = {num_keys}: a vocabulary of {tokenizer.vocab_size} pieces has"
                f" {len(candidates)} that can serve as keys; use 1 to {len(candidates)}, longer"
                " keys or a larger data.vocab_size"
            )
        letters = np.array(
            [tokenizer.single(letter) for letter in string.ascii_lowercase], dtype=np.int64
        )
        equals, question, newline = (tokenizer.single(mark) for mark in "=?\n")
        return cls(
            letters, equals, question, newline, np.array(candidates[:num_keys], dtype=np.int64)
        )


def _key_candidates(tokenizer: Tokenizer) -> list[int]:
    """Return ids that may stand in keys, best first.

    Excluded are line breaks, blanks and the tokens that facts are written with. Pieces of two or
    more letters come first, and among them the last learned, which are rare in text. Pieces that
    begin with a space come later: keys then read the same wherever they stand.
    """
    plain: list[int] = []
    rest: list[int] = []
    for token, text in reversed(tokenizer.learned_pieces()):
        if text in _RESERVED or not text.strip() or "\n" in text:
            continue
        (plain if len(text) > 1 and text.isalpha() else rest).append(token)
    return plain + rest
