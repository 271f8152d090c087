"""Policies: ways to choose a working context of exactly W entries without seeing the horizon.

`POLICIES` lists them with their functions. A policy's function reads a `View` of some histories:
evaluation and validation make views of batches of sequences, sessions make views of their trees.
Source: docs/inference.md, "Policies and controls".

Legend: R histories of equal length (one per row), T tokens, W entries, n (n_1) head blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import ConfigError, FocusConfig, MCConfig, RetrievalConfig
from mc_ds.config.run import PolicyName
from mc_ds.focus.cover import even_blocks, plan_of_blocks, uniform_blocks
from mc_ds.focus.lexical import bm25_library
from mc_ds.focus.opening import (
    blocks_opened_by,
    cover_opened_by,
    open_in_blocks,
    order_of,
    with_neighbours,
)
from mc_ds.focus.retrieval import (
    Match,
    attention_match,
    bm25_match,
    dense_match,
    ngram_match,
    retrieved,
)
from mc_ds.focus.view import Plan, Round, View
from mc_ds.variants import TrainingWCVariationAllocator

Choose = Callable[[View, int], Plan]
"""Maps a view and a number of entries to a plan of exactly that length."""


class Needs(Enum):
    """Networks that a policy needs besides the backbone."""

    NOTHING = "nothing"
    GISTS = "gists"
    LENSNET = "a LensNet"


class Access(Enum):
    """What a policy may read of a history."""

    LENGTH = "only the history's length"
    VISIBLE = "all tokens before the horizon"
    ATTENTION = "all tokens before the horizon, and the backbone's attention on them"
    UNRELATED_TAIL = "all tokens before the horizon, the tail replaced by another sequence's"
    OTHER_QUESTION = "all tokens before the horizon, the question replaced by another one"
    ANSWERS = "the positions of the facts needed for the answers"


@dataclass(frozen=True)
class PolicySpec:
    """A policy and its properties."""

    name: PolicyName
    choose: Choose
    needs: Needs = Needs.NOTHING
    access: Access = Access.LENGTH
    fixed_length: Callable[[MCConfig], int] | None = None
    """Number of entries, if the policy ignores the budget (such a policy is a *bound*); else None.
    """
    as_trained: bool = False
    """Whether contexts are covers, or with `random_blocks` tokens alone, as the model's training
    variants are.
    """
    match: Match | None = None
    """Scores blocks against the query of a retrieval policy; None for other policies."""
    retrieval: RetrievalConfig | None = None
    """Settings of a retrieval policy; None for other policies."""
    require: Callable[[], object] = tuple
    """Raises ConfigError if a package that the policy uses is not installed."""

    @property
    def query_tokens(self) -> int | None:
        """Query length of a retrieval policy, in tokens; None for other policies."""
        return None if self.retrieval is None else self.retrieval.query_tokens

    def using(self, settings: RetrievalConfig) -> "PolicySpec":
        """Return the same policy with the retrieval settings `settings`; unchanged if it does not
        retrieve.
        """
        if self.match is None:
            return self
        return replace(
            self,
            choose=partial(retrieved, match=self.match, settings=settings),
            needs=Needs.GISTS if settings.shape == "cover" else Needs.NOTHING,
            retrieval=settings,
        )

    def settings(self, focus: FocusConfig, mc: MCConfig) -> dict[str, float]:
        """Return the settings by which single blocks are chosen. Of retrieval, and of focus in
        contexts of tokens alone, these are the ones that differ from their defaults. Focus always
        names `lens_blocks`, the largest number of blocks; its default is that of the training.
        """
        source: FocusConfig | RetrievalConfig
        found: dict[str, float] = {}
        names: tuple[str, ...]
        if self.retrieval is not None:
            source, names = self.retrieval, ("share", "neighbours")
        elif self.as_trained and mc.random_blocks and self.access is not Access.ANSWERS:
            found = {"lens_blocks": focus.lens_blocks or mc.random_blocks}
            names = ("neighbours", "earlier_tokens") if self.needs is Needs.LENSNET else ()
            source = focus
        else:
            return {}
        default = type(source)()
        values = {name: getattr(source, name) for name in names}
        return found | {name: x for name, x in values.items() if x != getattr(default, name)}

    def omits(self, mc: MCConfig) -> bool:
        """Return whether contexts consist of tokens alone, some of them from anywhere."""
        if self.retrieval is not None:
            return self.retrieval.shape == "blocks"
        return self.as_trained and mc.random_blocks > 0

    def length(self, budget: float, mc: MCConfig) -> int:
        """Return W for a budget, which is a share of T. Raises ValueError for a budget below the
        coarsest cover.
        """
        if self.fixed_length is not None:
            return self.fixed_length(mc)
        return mc.geometry.reachable_at_most(budget * mc.seq_len)


def last_tokens(view: View, wc_length: int) -> Plan:
    """Return the last W tokens at LOD0."""
    starts = torch.arange(view.seq_len - wc_length, view.seq_len, device=view.device)
    starts = starts.expand(len(view.seeds), -1).contiguous()
    return Plan(torch.zeros_like(starts), starts)


def random_cover(view: View, wc_length: int) -> Plan:
    """Return a random cover of the history, drawn like the variants in training; with
    `random_blocks`, as many random blocks as LensNet chooses, and the latest other tokens.
    """
    if view.mc.random_blocks:
        blocks = view.geometry.head_nodes[1]
        keys = np.stack([np.random.default_rng(seed).random(blocks) for seed in view.seeds])
        scores = torch.from_numpy(keys).to(view.device)
        return _chosen_blocks(view, scores, wc_length)
    lengths = {"seq_len": view.seq_len, "train_wc_length": wc_length}
    mc = view.mc.model_copy(update=lengths)
    allocator = TrainingWCVariationAllocator.of(mc, wc_length)
    plans = [allocator.sample(1, seed) for seed in view.seeds]
    lods, starts = (np.concatenate(parts) for parts in zip(*plans, strict=True))
    return Plan(torch.from_numpy(lods).to(view.device), torch.from_numpy(starts).to(view.device))


def uniform_cover(view: View, wc_length: int) -> Plan:
    """Return a cover with recent blocks open and all others as coarse as possible."""
    return _cover(uniform_blocks(1, view.geometry, wc_length, view.device), view, wc_length)


def even_cover(view: View, wc_length: int) -> Plan:
    """Return a cover whose levels of detail differ as little as possible. Focus starts from it,
    which makes its result depend on the history alone.
    """
    return _cover(even_blocks(1, view.geometry, wc_length, view.device), view, wc_length)


def focused(view: View, wc_length: int) -> Plan:
    """Return the context that focus chooses by LensNet's scores; with `random_blocks`, the blocks
    with the highest scores, now or earlier, neighbours counted in, and the latest other tokens.
    """
    if view.mc.random_blocks:
        scores = view.lens_blocks()
        if earlier := view.focus_config.earlier_tokens:
            scores = torch.maximum(scores, view.lens_blocks(earlier))
        scores = with_neighbours(scores, view.focus_config.neighbours)
        return _chosen_blocks(view, scores, wc_length)
    rounds: list[Round] = []

    def score(lods: Tensor, starts: Tensor) -> Tensor:
        rounds.append(Round(lods, starts, view.lens_scores(lods, starts)))
        return rounds[-1].scores

    return view.focus(score, wc_length)._replace(rounds=tuple(rounds))


def answers_first(view: View, wc_length: int) -> Plan:
    """Return a cover, or with `random_blocks` tokens alone, that opens the blocks of the facts
    needed for the answers, then recent blocks.
    """
    geometry = view.geometry
    assert view.answers is not None
    blocks = view.answers[:, : geometry.head_len].unflatten(1, (-1, geometry.block_size))
    recency = torch.arange(blocks.size(1), device=view.device) / blocks.size(1)
    opened_by = blocks_opened_by if view.mc.random_blocks else cover_opened_by
    return opened_by(view, blocks.any(dim=2) + 1e-3 * recency, wc_length)


def _retrieval(
    name: PolicyName,
    match: Match,
    *,
    access: Access = Access.VISIBLE,
    require: Callable[[], object] = tuple,
) -> PolicySpec:
    """Return a retrieval policy with the default settings."""
    settings = RetrievalConfig()
    choose = partial(retrieved, match=match, settings=settings)
    return PolicySpec(name, choose, access=access, match=match, require=require).using(settings)


_POLICIES = (
    PolicySpec("recency", last_tokens),
    PolicySpec("random", random_cover, Needs.GISTS, as_trained=True),
    PolicySpec("uniform", uniform_cover, Needs.GISTS),
    PolicySpec("lens", focused, Needs.LENSNET, Access.VISIBLE, as_trained=True),
    PolicySpec("blind", focused, Needs.LENSNET, Access.UNRELATED_TAIL, as_trained=True),
    PolicySpec("other_question", focused, Needs.LENSNET, Access.OTHER_QUESTION, as_trained=True),
    PolicySpec("oracle", answers_first, Needs.GISTS, Access.ANSWERS, as_trained=True),
    _retrieval("bm25", bm25_match, require=bm25_library),
    _retrieval("ngram", ngram_match, require=bm25_library),
    _retrieval("dense", dense_match),
    _retrieval("attention", attention_match, access=Access.ATTENTION),
    PolicySpec("full", last_tokens, fixed_length=lambda mc: mc.seq_len),
    PolicySpec("tail", last_tokens, fixed_length=lambda mc: mc.recent_tokens),
)
POLICIES: dict[str, PolicySpec] = {spec.name: spec for spec in _POLICIES}
"""All policies by name."""


def policy(name: str) -> PolicySpec:
    """Return the policy with this name. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"policy = {name!r} is unknown: use {', '.join(POLICIES)}")
    return POLICIES[name]


def _chosen_blocks(view: View, scores_Rn: Tensor, wc_length: int) -> Plan:
    """Return a context of tokens alone: the tail, the blocks with the highest scores
    (`focus.lens_blocks` of them, by default `random_blocks`), and the latest other tokens.
    """
    count = open_in_blocks(view, wc_length)
    chosen = view.focus_config.lens_blocks or view.mc.random_blocks
    values = order_of(scores_Rn, count - min(count, chosen))
    return blocks_opened_by(view, values, wc_length)


def _cover(blocks_1n: Tensor, view: View, wc_length: int) -> Plan:
    """Return a plan in which every row has the cover with block LODs `blocks_1n`."""
    rows = len(view.seeds)
    lods, starts = plan_of_blocks(blocks_1n, view.geometry, wc_length)
    return Plan(lods.expand(rows, -1).contiguous(), starts.expand(rows, -1).contiguous())
