"""Texts that the model generates at a validation, as lines and as fields of the run's metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mc_ds.inference.decoding.text import Decode, TextStream

SHOWN_TOKENS = 32
"""Tokens shown before the continuation."""
MOST_TOKENS = 24
"""Maximum tokens of a continuation; each costs a forward pass."""


@dataclass(frozen=True)
class Continuation:
    """The model's continuation of a held-out sequence, with the true one."""

    task: str
    index: int
    """Index of the sequence within the task."""
    prompt: str
    """The last part of the model's input."""
    model: str
    """The model's continuation."""
    text: str
    """The true continuation."""

    @classmethod
    def of(
        cls, task: str, index: int, tokens: Sequence[int], written: Sequence[int], decode: Decode
    ) -> Self:
        """Decode the tokens `written` by the model in place of the last len(written) of
        `tokens`.
        """
        known = len(tokens) - len(written)
        before = tokens[max(0, known - SHOWN_TOKENS) : known]
        model, text = (_after(before, ids, decode) for ids in (written, tokens[known:]))
        return cls(task, index, decode(before), model, text)

    def lines(self) -> list[str]:
        """Return three lines, with texts quoted as in Python, so that line breaks are escaped."""
        return [
            f"continuation of {self.task}, sequence {self.index}, after {self.prompt!r}",
            f"  the model writes {self.model!r}",
            f"  the text has     {self.text!r}",
        ]

    def fields(self) -> dict[str, str]:
        """Return the fields for `metrics.jsonl`."""
        return {
            f"val/continuation/{self.index}/prompt": self.prompt,
            f"val/continuation/{self.index}/model": self.model,
            f"val/continuation/{self.index}/text": self.text,
        }


def _after(before: Sequence[int], ids: Sequence[int], decode: Decode) -> str:
    """Return the text that `ids` add after the tokens `before`."""
    stream = TextStream(decode, before=before)
    return "".join(map(stream.push, ids)) + stream.close()
