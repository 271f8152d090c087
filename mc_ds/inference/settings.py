"""What a session is made with."""

from dataclasses import dataclass
from numbers import Integral

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.focus.policies import POLICIES, Needs, Told
from mc_ds.inference.networks import Networks
from mc_ds.inference.reading.search import searchable
from mc_ds.inference.reading.window import check_budget

SESSION_POLICIES = tuple(
    name
    for name, spec in POLICIES.items()
    if spec.fixed_length is None and spec.told not in (Told.OTHER_QUESTION, Told.ANSWERS)
)
"""Policies that a session can follow: what they are told is in its history, or given to it as
another tail.
"""


@dataclass(frozen=True)
class Settings:
    """What a session was made with, as `InferenceModel.session` explains it."""

    policy: str
    budget: int
    """Entries W at most."""
    focus: FocusConfig
    seed: tuple[int, ...] = (0,)
    search: bool | int | None = None
    tail: tuple[int, ...] | None = None
    keep_prefix: float = 0.0

    def check(self, networks: Networks) -> None:
        """Raises ConfigError for what a session of these networks cannot have."""
        self._check_policy(networks)
        policy, budget, mc = POLICIES[self.policy], self.budget, networks.mc
        if not isinstance(budget, Integral):
            raise ConfigError(f"budget = {budget!r} is no number of entries: use an integer")
        if int(self.search or 0) < 0:
            raise ConfigError(
                f"search = {self.search} candidates cannot be had: use 0 (none) or more"
            )
        if self.search and policy.needs is Needs.LENSNET and not searchable(networks.lensnet):
            raise ConfigError(
                f"search = {self.search} needs a LensNet with an index (mc.lens_index) and ask "
                f"layers (mc.lens_ask): use 0"
            )
        if policy.needs is not Needs.NOTHING:
            check_budget(budget, mc)
        elif budget <= mc.horizon_tokens:
            raise ConfigError(
                f"budget = {budget} is not more than the horizon: use over horizon_tokens = "
                f"{mc.horizon_tokens}"
            )

    def _check_policy(self, networks: Networks) -> None:
        policy = self.policy
        if policy not in SESSION_POLICIES:
            raise ConfigError(f"policy = {policy!r} is unknown: use {', '.join(SESSION_POLICIES)}")
        needs = POLICIES[policy].needs
        if needs is not Needs.NOTHING and not networks.nets.shape.max_lod:
            raise ConfigError(
                f"policy = {policy!r} needs gists, and this model is a plain language model: use "
                f"recency"
            )
        if needs is Needs.LENSNET and networks.lensnet is None:
            raise ConfigError(
                f"policy = {policy!r} needs a LensNet, and this model has none: use recency, "
                f"random or uniform"
            )
