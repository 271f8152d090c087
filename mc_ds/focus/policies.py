"""Policies: ways to choose a working context of exactly W entries without seeing the horizon.

A policy is an entry of `POLICIES` with a function that chooses. The function reads a `View` of some
histories: evaluation and validation make views of batches of sequences, sessions of their trees.
Source: docs/inference.md, "Policies and controls".

Legend: R histories of equal length (a row each), T tokens, W entries, n_1 head blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.config.run import PolicyName
from mc_ds.focus.allocator import FocusAllocator, Scorer
from mc_ds.focus.controller import MCController
from mc_ds.focus.cover import even_blocks, plan_of_blocks, uniform_blocks
from mc_ds.geometry import Geometry
from mc_ds.variants import TrainingWCVariationAllocator


class Look(NamedTuple):
    """What LensNet said of a context on the way to a plan."""

    lods: Tensor
    """[R, W]."""
    starts: Tensor
    """[R, W], tokens of the history."""
    scores: Tensor
    """[R, M], of the first M <= W entries."""


class Plan(NamedTuple):
    """The working contexts of R histories."""

    lods: Tensor
    """[R, W]."""
    starts: Tensor
    """[R, W]: first token of each entry, counted from the beginning of the history."""
    rescored: Tensor | None = None
    """LensNet's scores [R, n_1] of the blocks that a search rescored, NaN for the others; None
    without a search.
    """
    looks: tuple[Look, ...] = ()
    """The contexts that focus scored on its way, in order."""


class View(Protocol):
    """What a policy may read of R histories. Use it inside `controller.inference()`."""

    @property
    def mc(self) -> MCConfig:
        """Settings of the model."""
        ...

    @property
    def controller(self) -> MCController:
        """Gives access to LensNet and allows the focus allocator."""
        ...

    @property
    def seeds(self) -> Sequence[tuple[int, ...]]:
        """Seeds of random choices, one per row."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the plans."""
        ...

    @property
    def seq_len(self) -> int:
        """T: input tokens of each history, horizon included."""
        ...

    @property
    def geometry(self) -> Geometry:
        """Geometry of the T input tokens."""
        ...

    def lens_scores(self, lods: Tensor, starts: Tensor) -> Tensor:
        """Return LensNet's scores of a plan [R, W]; the horizon's entries have score 0 or are left
        out.
        """
        ...

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        """Return the plan that the focus allocator makes of these histories with the scores of
        `score`.
        """
        ...

    @property
    def answers(self) -> Tensor | None:
        """Tokens of the facts that the answers need, bool [R, T]; None where they are not known."""
        ...


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
    """Return the context that opens the facts the answers need, then recent blocks, with as many
    rounds and edits as that takes.
    """
    geometry = view.geometry
    exhaustive = FocusConfig(
        iterations=2 * geometry.max_lod,
        max_replacements=geometry.max_units,
        threshold=0.0,
        cooldown=0,
    )
    assert view.answers is not None
    before = torch.nn.functional.pad(view.answers.float().cumsum(1), (1, 0))

    def score(lods: Tensor, starts: Tensor) -> Tensor:
        ends = starts + geometry.block_size**lods
        touched = before.gather(1, ends) > before.gather(1, starts)
        return _best_of_block(touched + 1e-3 * ends / geometry.seq_len, lods, starts, geometry)

    allocator = FocusAllocator(view.controller, geometry, exhaustive)
    lods, starts = uniform_cover(view, wc_length)[:2]
    return Plan(*allocator.focus(lods, starts, score=score))


_POLICIES = (
    PolicySpec("recency", last_tokens),
    PolicySpec("random", random_cover, Needs.GISTS),
    PolicySpec("uniform", uniform_cover, Needs.GISTS),
    PolicySpec("lens", focused, Needs.LENSNET, Told.VISIBLE),
    PolicySpec("blind", focused, Needs.LENSNET, Told.UNRELATED_TAIL),
    PolicySpec("other_question", focused, Needs.LENSNET, Told.OTHER_QUESTION),
    PolicySpec("oracle", answers_first, Needs.GISTS, Told.ANSWERS),
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


def _best_of_block(scores: Tensor, lods: Tensor, starts: Tensor, geometry: Geometry) -> Tensor:
    """Return scores [R, W] in which each token of an open block has the block's largest score, so
    that the mean over the block is its largest.
    """
    block = starts // geometry.block_size
    best = scores.new_full((len(scores), geometry.seq_len // geometry.block_size + 1), -torch.inf)
    best = best.scatter_reduce(1, block, scores, "amax")
    return torch.where(lods == 0, best.gather(1, block), scores)
