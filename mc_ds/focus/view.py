"""`View`, the input of a policy, and `Plan`, its output.

Legend: R histories of equal length (one per row), T tokens, V visible tokens (before the horizon),
W entries, D width, n_1 head blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mc_ds.config import FocusConfig, MCConfig
from mc_ds.focus.allocator import Scorer
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry


class Round(NamedTuple):
    """One round of focus: the context before its edits, with LensNet's scores."""

    lods: Tensor
    """[R, W]."""
    starts: Tensor
    """[R, W], as in `Plan`."""
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
    rounds: tuple[Round, ...] = ()
    """The rounds of focus that led to this plan, in order; empty for other policies."""


class View(Protocol):
    """What a policy may read of R histories. Valid inside `controller.inference()`."""

    @property
    def mc(self) -> MCConfig:
        """Settings of the model."""
        ...

    @property
    def focus_config(self) -> FocusConfig:
        """Settings of focus."""
        ...

    @property
    def controller(self) -> MCController:
        """The controller through which LensNet is called."""
        ...

    @property
    def seeds(self) -> Sequence[tuple[int, ...]]:
        """Seeds for random choices, one per row."""
        ...

    @property
    def device(self) -> torch.device:
        """Device on which plans are made."""
        ...

    @property
    def seq_len(self) -> int:
        """T: number of input tokens of each history, horizon included."""
        ...

    @property
    def geometry(self) -> Geometry:
        """Geometry of T input tokens."""
        ...

    @property
    def visible(self) -> Tensor:
        """Ids of the tokens before the horizon, int64 [R, V], the same that LensNet reads."""
        ...

    def embeddings(self) -> Tensor:
        """Return the backbone's embeddings of the visible tokens, [R, V, D]."""
        ...

    def attention(self, queries: int) -> Tensor:
        """Run the backbone over all visible tokens, and return the attention that the last
        `queries` of them give to each visible token, float32 [R, V]: the mean over layers, heads
        and queries.
        """
        ...

    def lens_scores(self, lods: Tensor, starts: Tensor) -> Tensor:
        """Return LensNet's scores of a plan, [R, W] with 0 for the horizon's entries, or without
        these entries.
        """
        ...

    def lens_blocks(self, earlier: int = 0) -> Tensor:
        """Return LensNet's scores of the head blocks when every block is a gist (`lod1_cover`),
        float32 [R, n_1]: as they are, or as they were `earlier` tokens before the end of the
        history, with -inf for blocks that were in the tail then.
        """
        ...

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        """Return the plan that the focus allocator makes for these histories from the scores of
        `score`.
        """
        ...

    @property
    def answers(self) -> Tensor | None:
        """Mask of the tokens of the facts needed for the answers, bool [R, T]; None if unknown."""
        ...
