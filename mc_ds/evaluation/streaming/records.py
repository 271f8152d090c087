"""Results of streaming: losses per document, their paired differences from the recency window and
from `lens`, and which share of the gain of full context over that window a policy recovers.

Documents are the independent units: every figure is a mean over per-document means, with the
standard error of that mean.

Legend: n documents.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_ds.storage import replace_text


class Estimate(NamedTuple):
    """A mean and its standard error, which is None for a single document."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class StreamRecord:
    """Results of one policy at one refocus interval."""

    policy: str
    query_tokens: int | None
    """Query length of a retrieval policy, in tokens; None for other policies."""
    refocus: int | None
    """Tokens between choices of a context; None: as many as a context has room for."""
    wc_length: int
    """Largest number of entries."""
    seq_len: int
    predicted: int
    """Predicted tokens per document."""
    loss: Estimate
    """In nats per token."""
    against_recency: Estimate | None = None
    """Loss minus that of the recency window at the same refocus interval, paired by document; None
    if recency was not measured.
    """
    lens_against: Estimate | None = None
    """Loss of `lens` minus this policy's at the same refocus interval, paired by document; None if
    lens was not measured.
    """
    recovered: Estimate | None = None
    """(recency - this) / (recency - full); None if recency or full was not measured, or full is not
    below recency by more than the standard error of their difference.
    """
    focus_ms: float
    """Milliseconds per predicted token spent on choosing contexts."""
    losses: list[float]
    """Mean loss per document."""
    settings: dict[str, float] = field(default_factory=dict)
    """Settings of the choice of blocks: see `PolicySpec.settings`."""


class StreamCell:
    """Accumulates the documents read with one setting."""

    def __init__(self) -> None:
        self._losses: list[NDArray[np.float64]] = []
        self._focus_s = 0.0

    def add(self, losses: NDArray[np.float64], focus_s: float) -> None:
        """Add a document: the losses of its tokens, and the seconds spent on choosing contexts."""
        self._losses.append(losses)
        self._focus_s += focus_s

    def record(
        self,
        *,
        policy: str,
        query_tokens: int | None,
        refocus: int | None,
        wc_length: int,
        seq_len: int,
        settings: dict[str, float],
    ) -> StreamRecord:
        """Return the results over all documents so far, without comparisons."""
        means = np.array([losses.mean() for losses in self._losses])
        tokens = sum(map(len, self._losses))
        return StreamRecord(
            policy=policy,
            query_tokens=query_tokens,
            refocus=refocus,
            wc_length=wc_length,
            seq_len=seq_len,
            predicted=len(self._losses[0]),
            loss=mean_of(means),
            focus_ms=1000 * self._focus_s / tokens,
            losses=means.tolist(),
            settings=settings,
        )


def mean_of(values_n: NDArray[np.float64]) -> Estimate:
    """Return the mean over documents and its standard error."""
    count = len(values_n)
    error = float(values_n.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Estimate(float(values_n.mean()), error)


def ratio_of(part_n: NDArray[np.float64], whole_n: NDArray[np.float64]) -> Estimate:
    """Return the ratio of the means of two figures of the same documents. The standard error is
    accurate to first order (delta method).
    """
    ratio = float(part_n.mean() / whole_n.mean())
    error = mean_of(part_n - ratio * whole_n).stderr
    return Estimate(ratio, None if error is None else error / abs(float(whole_n.mean())))


def compared(records: Sequence[StreamRecord]) -> list[StreamRecord]:
    """Return the records with their comparisons to recency, lens and full at the same refocus
    interval.
    """
    losses = {(record.policy, record.refocus): np.array(record.losses) for record in records}
    found = []
    for record in records:
        recency = losses.get(("recency", record.refocus))
        lens = losses.get(("lens", record.refocus))
        full = losses.get(("full", record.refocus))
        if lens is not None:
            record = replace(record, lens_against=mean_of(lens - np.array(record.losses)))
        if recency is not None:
            gain = recency - np.array(record.losses)
            record = replace(record, against_recency=mean_of(-gain))
            if full is not None and _is_positive(mean_of(recency - full)):
                record = replace(record, recovered=ratio_of(gain, recency - full))
        found.append(record)
    return found


def _is_positive(difference: Estimate) -> bool:
    """Return whether a share of the difference says anything."""
    return difference.value > (difference.stderr or 0)


def stream_table(records: Sequence[StreamRecord]) -> str:
    """Return a header and one line per record; estimates show mean and standard error."""
    header = (
        f"{'refocus':>8}{'policy':>12}{'query_tokens':>13}{'wc_length':>10}{'seq_len':>8}"
        f"{'loss':>19}{'against_recency':>20}{'lens_against':>20}{'recovered':>19}"
        f"{'focus_ms':>9}{'n':>5}"
    )
    return "\n".join([header, *map(_line, records)])


def save_stream(records: Sequence[StreamRecord], path: Path) -> None:
    """Write the records as a JSON list, overwriting an existing file. An estimate becomes an object
    with its two numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps([_plain(record) for record in records], indent=1) + "\n")


def _plain(record: StreamRecord) -> dict[str, object]:
    fields = {name: getattr(record, name) for name in StreamRecord.__dataclass_fields__}
    return {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name, value in fields.items()
    }


def _line(record: StreamRecord) -> str:
    def cell(estimate: Estimate | None, form: str) -> str:
        if estimate is None:
            return "-"
        error = "" if estimate.stderr is None else f" ± {estimate.stderr:.4f}"
        return f"{estimate.value:{form}}{error}"

    return (
        f"{record.refocus or 'never':>8}{record.policy:>12}{record.query_tokens or '-':>13}"
        f"{record.wc_length:>10}{record.seq_len:>8}{cell(record.loss, '.4f'):>19}"
        f"{cell(record.against_recency, '+.4f'):>20}{cell(record.lens_against, '+.4f'):>20}"
        f"{cell(record.recovered, '.3f'):>19}{record.focus_ms:>9.2f}{len(record.losses):>5}"
    )
