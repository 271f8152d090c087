"""What the model writes at a validation, as lines and as fields of the run's record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mc_ds.inference.decoding.text import Decode, TextStream

SHOWN_TOKENS = 32
"""Tokens before the continuation that are shown with it."""
MOST_TOKENS = 24
"""Tokens of a continuation at most: each costs a forward."""


@dataclass(frozen=True)
class Continuation:
    """What the model writes after the beginning of a held-out sequence."""

    task: str
    index: int
    """Number of the sequence within the task."""
    prompt: str
    """The end of what the model was given."""
    model: str
    """What it wrote."""
    text: str
    """What stands there."""

    @classmethod
    def of(
        cls, task: str, index: int, tokens: Sequence[int], written: Sequence[int], decode: Decode
    ) -> Self:
        """Decode a continuation of `tokens` less as many of their last as were `written`; the text
        is what these were.
        """
        known = len(tokens) - len(written)
        before = tokens[max(0, known - SHOWN_TOKENS) : known]
        model, text = (_after(before, ids, decode) for ids in (written, tokens[known:]))
        return cls(task, index, decode(before), model, text)

    def lines(self) -> list[str]:
        """Return it in three lines, whatever it holds: quoted as Python quotes text."""
        return [
            f"{self.task}, sequence {self.index}, goes on after {self.prompt!r}",
            f"  the model writes {self.model!r}",
            f"  the text has     {self.text!r}",
        ]

    def fields(self) -> dict[str, str]:
        """Return its fields in the record of a step."""
        return {
            f"val/continuation/{self.index}/prompt": self.prompt,
            f"val/continuation/{self.index}/model": self.model,
            f"val/continuation/{self.index}/text": self.text,
        }


def _after(before: Sequence[int], ids: Sequence[int], decode: Decode) -> str:
    """Return the text that tokens add to that of the tokens before."""
    stream = TextStream(decode, before=before)
    return "".join(map(stream.push, ids)) + stream.close()
