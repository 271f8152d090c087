"""The window of a working context: the part of the history that it covers, and its number of
entries.

Contexts have the same form as in training: T inputs in W entries, of which the last h are the
horizon. Of a history of H tokens, the first H - 1 are compressed into W - h entries, which focus
sees. The last known token is the next entry, and after it there is room for h - 1 tokens before the
next refocus. So T = H - 1 + h, and W is the largest reachable length within the budget.

    [ left out ][ first .... H - 1 tokens in W - h entries .... ][ H - 1 ][ room for h - 1 tokens ]

If even the coarsest cover exceeds the budget, its oldest nodes are left out.

Legend: H known tokens, h horizon, T = H - 1 + h, W entries, K block size, L coarsest level.
"""

from dataclasses import dataclass, replace

from mc_ds.config import ConfigError, MCConfig
from mc_ds.geometry import Geometry


@dataclass(frozen=True)
class Window:
    """The part of a history that a context covers. Plans count tokens from `first`."""

    known: int
    """Number of tokens H of the history."""
    first: int
    """First token covered; a multiple of K^L."""
    length: int
    """Number of entries W, horizon included."""
    horizon: int
    """Number of entries h of the horizon, including the last known token."""
    geometry: Geometry | None
    """Geometry of the T - first inputs from `first`; None if all inputs are read as tokens."""
    gaps: bool = False
    """True if the context consists of tokens and skips the others, instead of covering them by
    gists.
    """

    @property
    def seq_len(self) -> int:
        """Number of input tokens, horizon included."""
        return self.known - 1 + self.horizon - self.first

    @property
    def visible(self) -> int:
        """Number of entries that focus sees, W - h."""
        return self.length - self.horizon


def window_of(known: int, budget: int, mc: MCConfig, *, first: int = 0) -> Window:
    """Return the window of a history of `known` >= 1 tokens at `budget` entries, which must pass
    `check_budget`.

    The window begins at token `first` or later: `first` is the beginning of an earlier window, and
    tokens that were left out stay out.
    """
    horizon = mc.horizon_tokens
    inputs = known - 1 + horizon
    if inputs <= budget:
        return Window(known=known, first=0, length=inputs, horizon=horizon, geometry=None)
    geometry = mc.geometry.with_length(inputs)
    left_out = max(0, geometry.coarsest_length - budget)  # in coarsest nodes, each of one entry
    first = max(first, left_out * mc.block_size**mc.max_lod)
    geometry = geometry.with_length(inputs - first)
    return Window(
        known=known,
        first=first,
        length=geometry.reachable_at_most(budget),
        horizon=horizon,
        geometry=geometry,
    )


def recency_window(known: int, budget: int, mc: MCConfig) -> Window:
    """Return the window of a policy that reads only the last inputs as tokens: at most `budget`
    tokens.
    """
    length = min(known - 1 + mc.horizon_tokens, budget)
    return Window(known, first=0, length=length, horizon=mc.horizon_tokens, geometry=None)


def block_window(known: int, budget: int, mc: MCConfig) -> Window:
    """Return the window of a policy that reads whole blocks and the tail as tokens: at most
    `budget` tokens, from anywhere in the history.
    """
    recency = recency_window(known, budget, mc)
    inputs = known - 1 + mc.horizon_tokens
    if inputs <= budget:
        return recency
    return replace(recency, geometry=mc.geometry.with_length(inputs), gaps=True)


def smallest_budget(mc: MCConfig) -> int:
    """Return the smallest budget that suffices for every length: the tail, one coarsest node, and
    the largest number of entries that can be needed between them.
    """
    return mc.recent_tokens + (mc.max_lod + 1) * (mc.block_size - 1) + 1


def check_budget(budget: int, mc: MCConfig) -> None:
    """Raise ConfigError for a budget that cannot cover histories of every length."""
    if budget < smallest_budget(mc):
        raise ConfigError(
            f"budget = {budget} entries cannot hold a tail of {mc.recent_tokens} tokens and the "
            f"finer nodes before it: use at least {smallest_budget(mc)}"
        )
