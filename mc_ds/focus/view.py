"""What a policy reads, a `View`, and what it makes, a `Plan`.

Legend: R histories of equal length (a row each), T tokens, V visible tokens, W entries, D width,
n_1 head blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.focus.allocator import Scorer
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry


class Look(NamedTuple):
    """LensNet's scores of a context on the way to a plan."""

    lods: Tensor
    """[R, W]."""
    starts: Tensor
    """[R, W], as in plans."""
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

    @property
    def visible(self) -> Tensor:
        """Ids of the tokens before the horizon, int64 [R, V]: what LensNet reads too."""
        ...

    def embeddings(self) -> Tensor:
        """Return the backbone's embeddings of the visible tokens, [R, V, D]."""
        ...

    def attention(self, queries: int) -> Tensor:
        """Return the share of the attention of the last `queries` visible tokens that each visible
        token has where the backbone reads all of them, float32 [R, V]: the mean over layers, heads
        and queries.
        """
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
