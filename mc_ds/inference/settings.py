"""The settings of a session, and the check that a model supports them."""

from dataclasses import dataclass, field
from numbers import Integral, Real

from mc_ds.config import ConfigError, MCConfig, RetrievalConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.config.run import check_focus
from mc_ds.focus.policies import POLICIES, Access, Needs, PolicySpec
from mc_ds.inference.networks import Networks
from mc_ds.inference.reading.search import searchable
from mc_ds.inference.reading.window import check_budget
from mc_ds.inference.tree.tree import token_ids
from mc_ds.model.lensnet import LensNet

SESSION_POLICIES = tuple(
    name
    for name, spec in POLICIES.items()
    if spec.fixed_length is None and spec.access not in (Access.OTHER_QUESTION, Access.ANSWERS)
)
"""Policies that a session supports: they need only its history, or a replacement for its tail."""


@dataclass(frozen=True)
class Settings:
    """The settings of a session, documented in `InferenceModel.session`."""

    policy: str
    budget: int
    """Largest number of entries W."""
    focus: FocusConfig
    seed: tuple[int, ...] = (0,)
    search: bool | int | None = None
    tail: tuple[int, ...] | None = None
    keep_prefix: float = 0.0
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    refocus: int | None = None

    def __post_init__(self) -> None:
        """Turn NumPy's integers into Python's, which can be saved."""
        for name in ("budget", "search", "refocus"):
            value = getattr(self, name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))

    def interval(self, mc: MCConfig) -> int:
        """Return the number of tokens r that a generation appends between refocuses."""
        return self.refocus or min(mc.block_size, mc.horizon_tokens)

    @property
    def spec(self) -> PolicySpec:
        """The policy with its retrieval settings."""
        return POLICIES[self.policy].using(self.retrieval)

    def check(self, networks: Networks) -> None:
        """Raise ConfigError for settings that a session of these networks does not support."""
        if not isinstance(self.retrieval, RetrievalConfig):
            raise ConfigError(f"retrieval = {self.retrieval!r} is not a RetrievalConfig: give one")
        self._check_policy(networks)
        self._check_search(networks.lensnet)
        self._check_tail(networks)
        self._check_interval(networks.mc)
        policy, budget, mc = self.spec, self.budget, networks.mc
        if not isinstance(budget, Integral) or isinstance(budget, bool):
            raise ConfigError(f"budget = {budget!r} is not a number of entries: use an integer")
        if policy.needs is not Needs.NOTHING or policy.retrieval is not None:
            check_budget(budget, mc)
        elif budget <= mc.horizon_tokens:
            raise ConfigError(
                f"budget = {budget} leaves no entry before the horizon: use more than "
                f"horizon_tokens = {mc.horizon_tokens}"
            )
        if not all(isinstance(part, Integral) and part >= 0 for part in self.seed):
            raise ConfigError(
                f"seed = {self.seed} is not a valid seed: use whole numbers, 0 or more"
            )
        keep = self.keep_prefix
        if not isinstance(keep, Real) or not 0 <= keep < float("inf"):
            raise ConfigError(
                f"keep_prefix = {keep!r} is not an edit penalty: use a number, 0 or more"
            )
        if not isinstance(self.focus, FocusConfig):
            raise ConfigError(f"focus = {self.focus!r} is not a FocusConfig: give one")
        check_focus(self.focus, mc)

    def _check_policy(self, networks: Networks) -> None:
        policy = self.policy
        if policy not in SESSION_POLICIES:
            raise ConfigError(f"policy = {policy!r} is unknown: use {', '.join(SESSION_POLICIES)}")
        self.spec.require()
        needs = self.spec.needs
        if needs is not Needs.NOTHING and not networks.nets.shape.max_lod:
            raise ConfigError(
                f"policy = {policy!r} needs gists, and this model is a plain language model: use "
                "recency"
            )
        if needs is Needs.LENSNET and networks.lensnet is None:
            raise ConfigError(
                f"policy = {policy!r} needs a LensNet, and this model has none: use recency, "
                "random or uniform"
            )

    def _check_search(self, lensnet: LensNet | None) -> None:
        search = 0 if self.search is None else self.search
        if not isinstance(search, Integral) or search < 0:
            raise ConfigError(
                f"search = {search!r} is not a number of candidates: use 0 (none) or more"
            )
        if search and POLICIES[self.policy].needs is Needs.LENSNET and not searchable(lensnet):
            raise ConfigError(
                f"search = {search} needs a LensNet with an index (mc.lens_index) and ask layers "
                "(mc.lens_ask): use 0"
            )

    def _check_interval(self, mc: MCConfig) -> None:
        every, horizon = self.refocus, mc.horizon_tokens
        if every is None:
            return
        if not isinstance(every, Integral) or isinstance(every, bool) or not 1 <= every <= horizon:
            raise ConfigError(
                f"refocus = {every!r} is not a number of tokens between refocuses: a context of "
                f"this model has room for horizon_tokens = {horizon} new ones, so use 1 to "
                f"{horizon}"
            )

    def _check_tail(self, networks: Networks) -> None:
        if self.tail is None or networks.lensnet is None:
            return
        try:
            tail = token_ids(self.tail, networks.nets.shape.vocab_size)
        except ConfigError as error:
            raise ConfigError(f"tail: {error}") from None
        visible, earlier = networks.lensnet.tail_len, self.focus.earlier_tokens
        if len(tail) < visible + earlier:
            before = f" and the {earlier} tokens before it" if earlier else ""
            raise ConfigError(
                f"tail: {len(tail)} tokens cannot replace a visible tail of {visible}{before}: give"
                " at least as many"
            )
