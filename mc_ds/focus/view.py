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


class Plan(NamedTuple):
    """Working contexts of R histories."""

    lods: Tensor
    """[R, W]."""
    starts: Tensor
    """[R, W], tokens of the history."""
    rescored: Tensor | None = None
    """LensNet's scores [R, n_1] of the blocks that a search rescored, NaN for the others; None
    without a search.
    """


class View(Protocol):
    """What a policy may read of R histories. Valid inside `controller.inference()`."""

    @property
    def mc(self) -> MCConfig:
        """Of the model."""
        ...

    @property
    def controller(self) -> MCController:
        """Guards LensNet and the focus allocator."""
        ...

    @property
    def seeds(self) -> Sequence[tuple[int, ...]]:
        """Of random choices, one per row."""
        ...

    @property
    def device(self) -> torch.device:
        """Of plans."""
        ...

    @property
    def seq_len(self) -> int:
        """T, inputs of each history, horizon included."""
        ...

    @property
    def geometry(self) -> Geometry:
        """Of the T inputs."""
        ...

    @property
    def visible(self) -> Tensor:
        """Ids of the tokens before the horizon, int64 [R, V]: what LensNet reads too."""
        ...

    def embeddings(self) -> Tensor:
        """The backbone's embeddings of the visible tokens, [R, V, D]."""
        ...

    def attention(self, queries: int) -> Tensor:
        """The share of the attention of the last `queries` visible tokens that each visible token
        has where the backbone reads all of them, float32 [R, V]: the mean over layers, heads and
        queries.
        """
        ...

    def lens_scores(self, lods: Tensor, starts: Tensor) -> Tensor:
        """LensNet's scores [R, W] of a plan; those of the horizon are 0 or missing."""
        ...

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        """The plan to which the focus allocator of these histories comes by `score`."""
        ...

    @property
    def answers(self) -> Tensor | None:
        """Which tokens the answers stand in, bool [R, T]; None where nobody knows."""
        ...
