"""Draw working contexts and LensNet's scores as lines of text.

Legend: G rows of one sequence (row 0 is the baseline), W entries, T tokens, K block size. All
arrays are NumPy arrays on the host.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYMBOLS = "█▒░·"
"""Symbols of LOD 0, 1, 2 and 3, in this order."""
NOT_READ = -1
"""Level assigned to a token that no entry covers."""


def legend(max_lod: int) -> str:
    """Return the meaning of the symbols of the levels up to `max_lod`, as one line."""
    levels = (f"{symbol} LOD{level}" for level, symbol in enumerate(SYMBOLS[: max_lod + 1]))
    return "  ".join([*levels, "(blank: not covered)"])


def lod_ascii(
    lods: NDArray[Any], starts: NDArray[Any], block_size: int, seq_len: int, width: int = 128
) -> str:
    """Return one row's working context (`lods`, `starts`: [W]) as one line of at most `width`
    symbols.

    A symbol stands for one block of K tokens, or for several blocks where T tokens have more than
    `width` of them. It shows the LOD that covers most of its tokens (the finer one in a tie), or a
    blank where most are not covered.
    """
    blocks = -(-seq_len // block_size)
    cell_tokens = block_size * -(-blocks // width)
    levels = token_lods(lods, starts, block_size, seq_len)
    firsts = np.arange(0, seq_len, cell_tokens)
    per_cell = np.stack(
        [
            np.add.reduceat(levels == level, firsts, dtype=np.int64)
            for level in (*range(len(SYMBOLS)), NOT_READ)
        ]
    )
    return "".join(np.array([*SYMBOLS, " "])[per_cell.argmax(axis=0)])


def token_lods(
    lods: NDArray[Any], starts: NDArray[Any], block_size: int, seq_len: int
) -> NDArray[np.int64]:
    """Return the level [T] at which one row's working context (`lods`, `starts`: [W]) reads each
    token; NOT_READ where no entry covers it.
    """
    levels = np.full(seq_len, NOT_READ, dtype=np.int64)
    spans = block_size ** lods.astype(np.int64)
    within = np.arange(spans.sum()) - np.repeat(spans.cumsum() - spans, spans)
    levels[np.repeat(starts.astype(np.int64), spans) + within] = np.repeat(lods, spans)
    return levels


def span_marks(
    spans: NDArray[Any], block_size: int, seq_len: int, mark: str, width: int = 128
) -> str:
    """Return a line to print below a line of `lod_ascii`: `mark` under every symbol whose tokens
    overlap one of the `spans` [n, 2], blank elsewhere.
    """
    blocks = -(-seq_len // block_size)
    cell_tokens = block_size * -(-blocks // width)
    line = [" "] * -(-seq_len // cell_tokens)
    for first, last in spans:
        for cell in range(first // cell_tokens, (last - 1) // cell_tokens + 1):
            line[cell] = mark
    return "".join(line)


def lod_ascii_lines(
    lods: NDArray[Any], starts: NDArray[Any], block_size: int, seq_len: int, width: int = 128
) -> list[str]:
    """Return a legend, then one labelled line for each row of a sequence (`lods`, `starts`: [G,
    W]).
    """
    lines = [
        lod_ascii(row_lods, row_starts, block_size, seq_len, width)
        for row_lods, row_starts in zip(lods, starts, strict=True)
    ]
    return [
        legend(int(lods.max())),
        *(f"{label:>10} |{line}|" for label, line in zip(_labels(len(lines)), lines, strict=True)),
    ]


def lens_debug_lines(
    scores: NDArray[Any], row_scores: NDArray[Any], preference_corr: float | None
) -> list[str]:
    """Return a table of score statistics of one sequence, a line per row.

    `scores` [G, W - h] are LensNet's scores of the entries before the horizon; `row_scores` [G] are
    the horizon losses in nats; `preference_corr` is the Pearson correlation of margins and loss
    changes over the sequence's moves, None where either has no variance. It is negative where
    LensNet prefers moves that lower the loss.
    """
    lines = ["       row   score  adv_delta  policy: mean     std     min     max"]
    for label, policy, score in zip(_labels(len(row_scores)), scores, row_scores, strict=True):
        lines.append(
            f"{label:>10} {score:7.4f} {score - row_scores[0]:+10.4f}  {policy.mean():+12.4f}"
            f" {policy.std():7.4f} {policy.min():+7.4f} {policy.max():+7.4f}"
        )
    lines.append(
        "preference_corr"
        f" {'none: no variance' if preference_corr is None else f'{preference_corr:+.3f}'}"
    )
    return lines


def _labels(rows: int) -> Iterable[str]:
    return ("baseline" if row == 0 else f"variant {row}" for row in range(rows))
