"""Policies: ways to choose a working context of exactly W entries without seeing the horizon.

A policy is an entry of `POLICIES` with a function that chooses. The function reads a `View` of some
histories: evaluation and validation make views of batches of sequences, sessions of their trees.
Source: docs/inference.md, "Policies and controls".

Legend: R histories of equal length (a row each), T tokens, W entries, n_1 head blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import ConfigError, MCConfig, RetrievalConfig
from mc_ds.config.run import PolicyName
from mc_ds.focus.cover import even_blocks, plan_of_blocks, uniform_blocks
from mc_ds.focus.lexical import bm25_library
from mc_ds.focus.opening import cover_opened_by
from mc_ds.focus.retrieval import (
    Match,
    attention_match,
    bm25_match,
    dense_match,
    ngram_match,
    retrieved,
)
from mc_ds.focus.view import Look, Plan, View
from mc_ds.variants import TrainingWCVariationAllocator

Choose = Callable[[View, int], Plan]
"""Returns a plan of exactly the given number of entries."""


class Needs(Enum):
    """Networks that a policy needs."""

    NOTHING = "nothing"
    GISTS = "gists"
    LENSNET = "a LensNet"


class Told(Enum):
    """What a policy is told about a history."""

    LENGTH = "nothing but its length"
    VISIBLE = "all before the horizon"
    ATTENTION = "all before the horizon, read by the backbone token by token"
    UNRELATED_TAIL = "all before the horizon, the visible tail replaced by another sequence's"
    OTHER_QUESTION = "all before the horizon, the question replaced by another one"
    ANSWERS = "where the answers stand"


@dataclass(frozen=True)
class PolicySpec:
    """The properties of a policy."""

    name: PolicyName
    choose: Choose
    needs: Needs = Needs.NOTHING
    told: Told = Told.LENGTH
    fixed_length: Callable[[MCConfig], int] | None = None
    """Number of entries of a bound, which ignores the budget; None for policies that follow it."""
    match: Match | None = None
    """How well blocks match the query of a retrieval policy; None for the others."""
    retrieval: RetrievalConfig | None = None
    """Its settings; None for the others."""
    require: Callable[[], object] = tuple
    """Raises ConfigError where a package that it uses is not installed."""

    @property
    def query_tokens(self) -> int | None:
        """Tokens of the query of a retrieval policy; None for the others."""
        return None if self.retrieval is None else self.retrieval.query_tokens

    def using(self, settings: RetrievalConfig) -> "PolicySpec":
        """Return the same policy with other settings of retrieval, if it has any."""
        if self.match is None:
            return self
        return replace(
            self,
            choose=partial(retrieved, match=self.match, settings=settings),
            needs=Needs.GISTS if settings.shape == "cover" else Needs.NOTHING,
            retrieval=settings,
        )

    def length(self, budget: float, mc: MCConfig) -> int:
        """Return W for a budget, a share of T. Raises ValueError for one below the coarsest
        cover.
        """
        if self.fixed_length is not None:
            return self.fixed_length(mc)
        return mc.geometry.reachable_at_most(budget * mc.seq_len)


def last_tokens(view: View, wc_length: int) -> Plan:
    """Return the last W tokens."""
    starts = torch.arange(view.seq_len - wc_length, view.seq_len, device=view.device)
    starts = starts.expand(len(view.seeds), -1).contiguous()
    return Plan(torch.zeros_like(starts), starts)


def random_cover(view: View, wc_length: int) -> Plan:
    """Return a random cover of the history, drawn as training's variants are."""
    lengths = {"seq_len": view.seq_len, "train_wc_length": wc_length}
    mc = view.mc.model_copy(update=lengths)
    allocator = TrainingWCVariationAllocator.of(mc, wc_length)
    plans = [allocator.sample(1, seed) for seed in view.seeds]
    lods, starts = (np.concatenate(parts) for parts in zip(*plans, strict=True))
    return Plan(torch.from_numpy(lods).to(view.device), torch.from_numpy(starts).to(view.device))


def uniform_cover(view: View, wc_length: int) -> Plan:
    """Return a cover with recent blocks open and all else as coarse as possible."""
    return _cover(uniform_blocks(1, view.geometry, wc_length, view.device), view, wc_length)


def even_cover(view: View, wc_length: int) -> Plan:
    """Return a cover with levels of detail as equal as possible. Focus starts from it, so that its
    result depends only on the history.
    """
    return _cover(even_blocks(1, view.geometry, wc_length, view.device), view, wc_length)


def focused(view: View, wc_length: int) -> Plan:
    """Return the context that focus makes with LensNet's scores."""
    looks: list[Look] = []

    def score(lods: Tensor, starts: Tensor) -> Tensor:
        looks.append(Look(lods, starts, view.lens_scores(lods, starts)))
        return looks[-1].scores

    return view.focus(score, wc_length)._replace(looks=tuple(looks))


def answers_first(view: View, wc_length: int) -> Plan:
    """Return the cover that opens the facts the answers need, then recent blocks."""
    geometry = view.geometry
    assert view.answers is not None
    blocks = view.answers[:, : geometry.head_len].unflatten(1, (-1, geometry.block_size))
    recency = torch.arange(blocks.size(1), device=view.device) / blocks.size(1)
    return cover_opened_by(view, blocks.any(dim=2) + 1e-3 * recency, wc_length)


def _retrieval(
    name: PolicyName,
    match: Match,
    *,
    told: Told = Told.VISIBLE,
    require: Callable[[], object] = tuple,
) -> PolicySpec:
    """Make a retrieval policy with the default settings."""
    settings = RetrievalConfig()
    choose = partial(retrieved, match=match, settings=settings)
    return PolicySpec(name, choose, told=told, match=match, require=require).using(settings)


_POLICIES = (
    PolicySpec("recency", last_tokens),
    PolicySpec("random", random_cover, Needs.GISTS),
    PolicySpec("uniform", uniform_cover, Needs.GISTS),
    PolicySpec("lens", focused, Needs.LENSNET, Told.VISIBLE),
    PolicySpec("blind", focused, Needs.LENSNET, Told.UNRELATED_TAIL),
    PolicySpec("other_question", focused, Needs.LENSNET, Told.OTHER_QUESTION),
    PolicySpec("oracle", answers_first, Needs.GISTS, Told.ANSWERS),
    _retrieval("bm25", bm25_match, require=bm25_library),
    _retrieval("ngram", ngram_match, require=bm25_library),
    _retrieval("dense", dense_match),
    _retrieval("attention", attention_match, told=Told.ATTENTION),
    PolicySpec("full", last_tokens, fixed_length=lambda mc: mc.seq_len),
    PolicySpec("tail", last_tokens, fixed_length=lambda mc: mc.recent_tokens),
)
POLICIES: dict[str, PolicySpec] = {spec.name: spec for spec in _POLICIES}
"""All policies by name."""


def policy(name: str) -> PolicySpec:
    """Return the policy of this name. Raises ConfigError where there is none."""
    if name not in POLICIES:
        raise ConfigError(f"policy = {name!r} is unknown: use {', '.join(POLICIES)}")
    return POLICIES[name]


def _cover(blocks_1n: Tensor, view: View, wc_length: int) -> Plan:
    """Return one cover (block LODs [1, n_1]) as the plan of every row."""
    rows = len(view.seeds)
    lods, starts = plan_of_blocks(blocks_1n, view.geometry, wc_length)
    return Plan(lods.expand(rows, -1).contiguous(), starts.expand(rows, -1).contiguous())
