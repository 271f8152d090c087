"""Read documents with inference sessions, one document and one token chunk at a time, as in
serving.

A document has T + 1 tokens, of which the last N are predicted. The history grows: the session has
read T + 1 - N tokens before the first choice, and all but the last chunk before the last one.
All policies get contexts of the same number of entries: the longest cover within the budget.

Legend: T tokens, N predicted tokens, r tokens between choices, W entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import FocusConfig, MCConfig
from mc_ds.evaluation.sessions import Sessions
from mc_ds.evaluation.streaming.streaming import Documents, Read, Setting, Streaming
from mc_ds.focus.policies import PolicySpec
from mc_ds.inference import MegaContextTree, Session


@dataclass(frozen=True)
class DocumentSessions:
    """Reads documents with one session per setting over a tree in memory. Implements
    `DocumentReader`.
    """

    sessions: Sessions
    batch_size: int = 1

    @property
    def mc(self) -> MCConfig:
        """Settings, with the number T of tokens that are read."""
        return self.sessions.mc

    @property
    def focus(self) -> FocusConfig:
        """Settings of focus."""
        return self.sessions.focus

    def document_tokens(self, streaming: Streaming) -> int:
        """Return T + 1."""
        return self.mc.seq_len + 1

    def read(
        self, streaming: Streaming, documents: Documents, numbers: Sequence[int]
    ) -> list[list[Read]]:
        """Read the single document of `numbers` with every setting."""
        (number,) = numbers
        beginning = self.mc.seq_len + 1 - streaming.predicted
        tree = self.sessions.model.open_tree("ram")
        tree.append(documents[number][:beginning])
        found = []
        for setting in streaming.settings:
            session = self._session(setting.spec, streaming.budget, tree, number)
            found.append([self._read(session, streaming, setting, documents[number])])
            tree.truncate(beginning)
        return found

    def _read(
        self, session: Session, streaming: Streaming, setting: Setting, tokens: NDArray[np.int64]
    ) -> Read:
        """Read the tokens that follow the session's history."""
        losses, step = [], streaming.step(setting)
        for first in range(len(session), len(tokens), step):
            chunk = tokens[first : first + step]
            if setting.spec.fixed_length is None:
                inputs = len(session) - 1 + self.mc.horizon_tokens
                present = self.mc.geometry.with_length(inputs)
                session.budget = present.reachable_at_most(streaming.budget)
            losses.append(session.losses(chunk).nll.double().cpu().numpy())
            session.ingest(chunk)
        return Read(np.concatenate(losses), session.phases.focus_seconds())

    def _session(
        self, spec: PolicySpec, budget: int, tree: MegaContextTree, number: int
    ) -> Session:
        """Return a session of the policy; `full` is a recency window that is long enough for
        everything.
        """
        whole = spec.fixed_length is not None
        return self.sessions.model.session(
            "recency" if whole else spec.name,
            self.mc.seq_len + self.mc.horizon_tokens if whole else budget,
            tree,
            seed=(self.sessions.seed, number),
            search=self.sessions.search,
            focus=self.sessions.focus,
            retrieval=spec.retrieval,
        )
