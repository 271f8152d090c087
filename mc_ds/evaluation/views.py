"""What policies read of one sequence, as data and as text. `focus_plot.py` draws the figure.

Legend: T tokens, W entries, h horizon, K block size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mc_ds.drawing import legend, lod_ascii, span_marks, token_lods
from mc_ds.geometry import Geometry
from mc_ds.inference.decoding.text import Decode, TextStream
from mc_ds.tasks import TaskSample


@dataclass(frozen=True, eq=False)
class ScoredContext:
    """A context in one of the rounds of focus, with LensNet's scores."""

    lods: NDArray[np.int64]
    """[W]."""
    starts: NDArray[np.int64]
    """[W], token positions in the history."""
    scores: NDArray[np.float32]
    """[W - h]: LensNet's scores of the visible entries."""


@dataclass(frozen=True, eq=False)
class Focus:
    """What the policies read of one sequence. `focus_lines` draws it as text, `focus_plot.py` as a
    figure.
    """

    task: str
    index: int
    """Number of the sequence within the task."""
    geometry: Geometry
    horizon: int
    """h: policies do not see the last h - 1 tokens, whose loss is measured after the choice."""
    wc_length: int
    """W of the policies that follow the budget."""
    contexts: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """`lods` and `starts`, [W] each, by policy."""
    sample: TaskSample
    texts: Sequence[str] = ()
    """The text of each of the sample's spans; empty without a tokenizer."""
    pieces: Sequence[str] = ()
    """The text that each of the T + 1 tokens adds; empty without a tokenizer."""
    rounds: Mapping[str, Sequence[ScoredContext]] = field(default_factory=dict)
    """Contexts scored in the rounds of focus, by policy; only policies that use LensNet have them.
    """

    @property
    def title(self) -> str:
        """Task, sequence number and lengths, for headings."""
        return (
            f"{self.task}, sequence {self.index}, "
            f"{self.wc_length} entries for {self.geometry.seq_len} tokens"
        )

    @property
    def known(self) -> int:
        """Number of known tokens of the history: up to and including the first target of the
        horizon.
        """
        return self.geometry.seq_len - self.horizon + 1

    def token_lods(self, policy: str) -> NDArray[np.int64]:
        """Return the level [T] at which `policy` reads each token; NOT_READ where it does not."""
        return token_lods(*self.contexts[policy], self.geometry.block_size, self.geometry.seq_len)

    def opened(self, policy: str) -> NDArray[np.bool_]:
        """Return whether `policy` reads each of the sample's n spans completely at LOD0, bool
        [n].
        """
        lods = self.token_lods(policy)
        return np.array(
            [bool((lods[first:last] == 0).all()) for first, last in self.sample.spans],
            dtype=np.bool_,
        )

    def with_texts(self, decode: Decode) -> "Focus":
        """Return a copy with the texts of its spans and tokens."""
        tokens: list[int] = self.sample.tokens.tolist()
        stream = TextStream(decode)
        pieces = [stream.push(token) for token in tokens]
        pieces[-1] += stream.close()
        texts = [decode(tokens[first:last]).strip() for first, last in self.sample.spans]
        return replace(self, texts=texts, pieces=pieces)


def focus_lines(focus: Focus) -> list[str]:
    """Return the contexts as text: a line per policy, then lines that mark the spans and, if
    `focus` has texts, a line with the texts of the spans.
    """
    block_size, seq_len = focus.geometry.block_size, focus.geometry.seq_len
    lines = [focus.title, legend(focus.geometry.max_lod)]
    lines += [
        f"{name:>15} |{lod_ascii(lods, starts, block_size, seq_len)}|"
        for name, (lods, starts) in focus.contexts.items()
    ]
    for label, spans, mark in (
        ("asked", focus.sample.spans, "^"),
        ("not asked", focus.sample.distractors, "'"),
    ):
        if len(spans):
            lines.append(f"{label:>15}  {span_marks(spans, block_size, seq_len, mark)}")
    if focus.texts:
        lines.append(f"{'asked for':>15}  {', '.join(focus.texts)}")
    return lines
