"""Streaming: a session reads a long document and predicts its last tokens, choosing its context
anew every r tokens.

Of a document's T + 1 tokens the last N are predicted. Before every r of them the policy chooses a
context from the history alone, the loss of the r tokens is computed in that context, and the r
tokens join the history. All policies get contexts of the same number of entries: the longest cover
within the budget. `full` reads everything.

Legend: T tokens, N predicted tokens, r tokens between choices, h horizon, W entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.evaluation.stream_records import StreamCell, StreamRecord, compared
from mc_ds.focus.policies import PolicySpec
from mc_ds.inference import SESSION_POLICIES, InferenceModel, MegaContextTree, Session

STREAMED_POLICIES = (*SESSION_POLICIES, "full")
"""Policies that can read documents, which have no question and no answers."""


class Setting(NamedTuple):
    """One way to read documents."""

    spec: PolicySpec
    refocus: int | None
    """Tokens r between choices; None: h, as many as a context has room for."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Reads documents of T + 1 tokens, with T = `mc.seq_len`. Raises ConfigError for a policy that
    cannot read documents and for token counts that do not fit.
    """

    model: InferenceModel
    mc: MCConfig
    budget: int
    """W."""
    predicted: int
    """N."""
    settings: Sequence[Setting]
    focus: FocusConfig | None = None
    """Settings of the focus allocator; None: the model's."""
    seed: int = 0
    """Seed of random choices."""
    search: bool | int | None = None
    """See `InferenceModel.session`."""

    def __post_init__(self) -> None:
        horizon = self.mc.horizon_tokens
        for spec, refocus in self.settings:
            if spec.name not in STREAMED_POLICIES:
                raise ConfigError(
                    f"policy = '{spec.name}' cannot read documents, which have no question: use "
                    f"{', '.join(STREAMED_POLICIES)}"
                )
            if refocus is not None and refocus > horizon:
                raise ConfigError(
                    f"refocus = {refocus}: a context of this model has room for only "
                    f"horizon_tokens = {horizon} new tokens: use at most {horizon}"
                )
        room = self.mc.seq_len - self.mc.recent_tokens - self.mc.block_size
        if self.predicted > room:
            raise ConfigError(
                f"predict = {self.predicted} leaves no history in seq_len = {self.mc.seq_len}: use "
                f"at most {room}"
            )

    def run(self, documents: Sequence[NDArray[np.int64]]) -> Iterator[list[StreamRecord]]:
        """After each document, yield the records of every setting over all documents so far."""
        cells = [StreamCell() for _ in self.settings]
        for number, tokens in enumerate(documents):
            tree = self.model.open_tree("ram")
            tree.append(tokens[: self._beginning])
            for setting, cell in zip(self.settings, cells, strict=True):
                losses, focus_s = self._read(setting, tokens, tree, number)
                cell.add(losses, focus_s)
                tree.truncate(self._beginning)
            yield compared([self._record(*pair) for pair in zip(self.settings, cells, strict=True)])

    @property
    def _beginning(self) -> int:
        """Number of tokens in the history at first."""
        return self.mc.seq_len + 1 - self.predicted

    def _read(
        self, setting: Setting, tokens: NDArray[np.int64], tree: MegaContextTree, number: int
    ) -> tuple[NDArray[np.float64], float]:
        """Return the losses [N] of the predicted tokens, and the seconds spent on choosing
        contexts.
        """
        session, losses = self._session(setting.spec, tree, number), []
        for first in range(self._beginning, len(tokens), setting.refocus or self.mc.horizon_tokens):
            chunk = tokens[first : first + (setting.refocus or self.mc.horizon_tokens)]
            if setting.spec.fixed_length is None:
                inputs = len(tree) - 1 + self.mc.horizon_tokens
                present = self.mc.geometry.with_length(inputs)
                session.budget = present.reachable_at_most(self.budget)
            losses.append(session.losses(chunk).nll.double().cpu().numpy())
            session.ingest(chunk)
        return np.concatenate(losses), session.phases.focus_seconds()

    def _session(self, spec: PolicySpec, tree: MegaContextTree, number: int) -> Session:
        """Return a session of the policy; `full` is a recency window that is long enough for
        everything.
        """
        whole = spec.fixed_length is not None
        return self.model.session(
            "recency" if whole else spec.name,
            self.mc.seq_len + self.mc.horizon_tokens if whole else self.budget,
            tree,
            seed=(self.seed, number),
            search=self.search,
            focus=self.focus,
            retrieval=spec.retrieval,
        )

    def _record(self, setting: Setting, cell: StreamCell) -> StreamRecord:
        spec, refocus = setting
        whole = spec.fixed_length is not None
        return cell.record(
            policy=spec.name,
            query_tokens=spec.query_tokens,
            refocus=refocus,
            wc_length=self.mc.seq_len if whole else self.budget,
            seq_len=self.mc.seq_len,
        )
