"""Streaming: reads long documents and predicts their last tokens, choosing a context anew every r
tokens.

Of a document, N tokens in a row are predicted. Before every r of them the policy chooses a context
from the history alone, and the loss of the r tokens is computed in that context; then the r tokens
are history. `full` reads everything.

Legend: T tokens, N predicted tokens, r tokens between choices, h horizon, W entries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError, FocusConfig, MCConfig
from mc_ds.evaluation.streaming.records import StreamCell, StreamRecord, compared
from mc_ds.focus.policies import PolicySpec
from mc_ds.inference import SESSION_POLICIES

STREAMED_POLICIES = (*SESSION_POLICIES, "full")
"""Policies that can read documents, which have no question and no answers."""
Documents = Sequence[NDArray[np.int64]]


class Setting(NamedTuple):
    """One way to read documents."""

    spec: PolicySpec
    refocus: int | None
    """Tokens r between choices; None: h, as many as a context has room for."""


class Read(NamedTuple):
    """A document, read with one setting."""

    losses: NDArray[np.float64]
    """Loss of each predicted token in nats, [N]."""
    focus_s: float
    """Seconds spent on choosing contexts."""


class DocumentReader(Protocol):
    """A model with a way to read documents."""

    @property
    def mc(self) -> MCConfig:
        """Settings, with the number T of tokens that are read."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of documents that are read together."""
        ...

    @property
    def focus(self) -> FocusConfig:
        """Settings of focus."""
        ...

    def document_tokens(self, streaming: "Streaming") -> int:
        """Return the number of tokens that a document must have."""
        ...

    def read(
        self, streaming: "Streaming", documents: Documents, numbers: Sequence[int]
    ) -> list[list[Read]]:
        """Read the documents with these numbers; return for every setting what was found in each of
        them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """What is measured on documents. Raises ConfigError for a policy that cannot read documents,
    and for token counts that do not fit.
    """

    reader: DocumentReader
    budget: int
    """W."""
    predicted: int
    """N."""
    settings: Sequence[Setting]

    def __post_init__(self) -> None:
        for spec, _ in self.settings:
            if spec.name not in STREAMED_POLICIES:
                raise ConfigError(
                    f"policy = '{spec.name}' cannot read documents, which have no question: use "
                    f"{', '.join(STREAMED_POLICIES)}"
                )
        check_fits(self.mc, self.predicted, (setting.refocus for setting in self.settings))

    @property
    def mc(self) -> MCConfig:
        """Settings, with the number T of tokens that are read."""
        return self.reader.mc

    @property
    def document_tokens(self) -> int:
        """Number of tokens that a document must have."""
        return self.reader.document_tokens(self)

    def step(self, setting: Setting) -> int:
        """Return r."""
        return setting.refocus or self.mc.horizon_tokens

    def run(self, documents: Documents) -> Iterator[list[StreamRecord]]:
        """After each batch of documents, yield the records of every setting over all documents so
        far.
        """
        cells = [StreamCell() for _ in self.settings]
        for first in range(0, len(documents), self.reader.batch_size):
            numbers = range(first, min(first + self.reader.batch_size, len(documents)))
            found = self.reader.read(self, documents, numbers)
            for cell, reads in zip(cells, found, strict=True):
                for read in reads:
                    cell.add(*read)
            yield compared([self._record(*pair) for pair in zip(self.settings, cells, strict=True)])

    def _record(self, setting: Setting, cell: StreamCell) -> StreamRecord:
        spec, refocus = setting
        whole = spec.fixed_length is not None
        return cell.record(
            policy=spec.name,
            query_tokens=spec.query_tokens,
            refocus=refocus,
            wc_length=self.mc.seq_len if whole else self.budget,
            seq_len=self.mc.seq_len,
            settings=spec.settings(self.reader.focus, self.mc),
        )


def check_fits(mc: MCConfig, predicted: int, refocus: Iterable[int | None]) -> None:
    """Raise ConfigError for a refocus interval or a number of predicted tokens that does not fit a
    history of T tokens.
    """
    horizon = mc.horizon_tokens
    for interval in refocus:
        if interval is not None and interval > horizon:
            raise ConfigError(
                f"refocus = {interval}: a context of this model has room for only "
                f"horizon_tokens = {horizon} new tokens: use at most {horizon}"
            )
    room = mc.seq_len - mc.recent_tokens - mc.block_size
    if predicted > room:
        raise ConfigError(
            f"predict = {predicted} leaves no history in seq_len = {mc.seq_len}: use at most {room}"
        )
