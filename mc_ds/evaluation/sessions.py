"""Evaluate policies with inference sessions: the same figures as `batches`, computed by the code
that serves users.

A sample's history is ingested once, into a tree in memory. Every policy and budget has a session
over that tree, which computes the loss of the horizon.

Legend: T tokens, h horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.evaluation.measure import Samples
from mc_ds.evaluation.records import Measured
from mc_ds.focus.policies import POLICIES, Access, PolicySpec
from mc_ds.focus.view import Plan
from mc_ds.inference import SESSION_POLICIES, InferenceModel, MegaContextTree, Session
from mc_ds.tasks import TaskSample

EVALUATED_POLICIES = tuple(
    name for name, spec in POLICIES.items() if spec.access is not Access.ANSWERS
)
"""Policies that sessions can evaluate: all except the oracle, which needs the answers' positions.
"""


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """Reads sequences with sessions of `model`, at the lengths of `mc`. Implements
    `measure.Reader`.
    """

    model: InferenceModel
    mc: MCConfig
    focus: FocusConfig
    """Settings of focus."""
    seed: int = 0
    """Seed of random choices."""
    search: bool | int | None = None
    """See `InferenceModel.session`."""
    batch_size: int = 1

    def read(self, samples: Samples, specs: Sequence[PolicySpec]) -> "SessionReading":
        """Ingest the single sample. Raises ConfigError for the oracle."""
        for spec in specs:
            if spec.access is Access.ANSWERS:
                raise ConfigError(
                    f"policy = '{spec.name}' needs the positions of the answers, which a session "
                    f"does not have: evaluate it with --checkpoint"
                )
        (index,), (sample,) = samples.ids, samples.samples
        tails = {Access.OTHER_QUESTION: self._visible(sample.other or sample)}
        if samples.before:
            tails[Access.UNRELATED_TAIL] = self._visible(samples.before[0])
        tree = self.model.open_tree("ram")
        tree.append(sample.tokens[: self.known])
        return SessionReading(self, index, sample, tails, tree)

    @property
    def known(self) -> int:
        """Number of known tokens of a history: up to and including the first target of the
        horizon.
        """
        return self.mc.seq_len - self.mc.horizon_tokens + 1

    def _visible(self, sample: TaskSample) -> list[int]:
        """Return the tokens of a sequence that LensNet may see."""
        return [int(token) for token in sample.tokens[: self.known - 1]]


@dataclass(frozen=True)
class SessionReading:
    """A sequence ingested into a tree. Implements `measure.Reading`."""

    reader: Sessions
    index: int
    sample: TaskSample
    tails: dict[Access, list[int]]
    """Visible tokens of other sequences, which replace the visible tail in controls."""
    tree: MegaContextTree

    def plan(self, spec: PolicySpec, wc_length: int) -> Plan:
        """Return the context that a policy chooses."""
        return _plan(self._session(spec, wc_length))

    def measure(self, spec: PolicySpec, wc_length: int) -> Measured:
        """Compute the loss of the horizon in a session of the policy."""
        session = self._session(spec, wc_length)
        losses = session.losses(self.sample.tokens[self.reader.known :])
        mask = torch.from_numpy(self.sample.horizon_mask).to(losses.nll.device)
        score: Tensor = (losses.nll * mask).sum() / mask.sum().clamp_min(1e-9)
        return Measured(score[None], losses.correct[None], _plan(session))

    def _session(self, spec: PolicySpec, wc_length: int) -> Session:
        """Return a session over the history.

        Bounds and controls are not session policies. For them the session policy with the same
        choice function is used, with another length or tail.
        """
        name = (
            spec.name
            if spec.name in SESSION_POLICIES
            else next(name for name in SESSION_POLICIES if POLICIES[name].choose is spec.choose)
        )
        return self.reader.model.session(
            name,
            wc_length,
            self.tree,
            seed=(self.reader.seed, self.index),
            search=self.reader.search,
            tail=self.tails.get(spec.access),
            focus=self.reader.focus,
            retrieval=spec.retrieval,
        )


def _plan(session: Session) -> Plan:
    lods, starts = session.working_context()
    context = session.reader.context
    first = 0 if context is None else context.window.first
    rounds = () if context is None else context.rounds
    return Plan(
        torch.from_numpy(lods)[None],
        torch.from_numpy(starts)[None],
        rounds=tuple(round_._replace(starts=round_.starts + first) for round_ in rounds),
    )
