"""Reads one history: keeps its working context and its row of the decoder's cache up to the last
known token.

On the complete history the policy chooses a context (see `window` for its room); the decoder's
cache is kept up to the first entry that differs and recomputed behind it. While tokens are
generated this repeats every K tokens, from the present context.

Legend: H known tokens, h horizon, K block size, W entries, D width.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.focus.policies import POLICIES, Needs
from mc_ds.inference.decoding.row import CachedRow
from mc_ds.inference.networks import Networks
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.contexts import Context, Contexts
from mc_ds.inference.reading.saved import SavedContext
from mc_ds.inference.reading.window import Window, recency_window, window_of
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.tree import MegaContextTree, Tokens, token_ids
from mc_ds.model.positions import rotary_tables


class Losses(NamedTuple):
    """What a session says of given tokens."""

    nll: Tensor
    """Next-token loss of each, float32 [n], nats."""
    correct: Tensor
    """Whether each was the likeliest, bool [n]."""


class Reader:
    """A tree, the context through which it is read, and its row of a decoder. For one thread."""

    def __init__(
        self,
        networks: Networks,
        tree: MegaContextTree,
        settings: Settings,
        row: CachedRow,
        phases: Phases,
    ) -> None:
        self.networks, self.tree, self.settings, self.phases = networks, tree, settings, phases
        self.row = row
        self.contexts = Contexts(networks, tree, settings, phases)
        self._context: Context | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._cached: Context | None = None
        """Whose entries the row holds."""
        self._seen = tree.version, tree.cuts
        """Changes of the tree that the context and the cache account for."""
        self._is_current = False
        """Whether the last refocus saw the whole history, and nothing else."""

    # History

    def __len__(self) -> int:
        """Return known tokens H, generated ones included."""
        return len(self.tree)

    def truncate(self, count: int) -> None:
        """Forget all tokens from `count` on. Raises ConfigError where there are fewer."""
        self._notice_changes()
        self.tree.truncate(count)
        self._forget(count)

    def _forget(self, count: int) -> None:
        """Keep what depends on the first `count` tokens alone."""
        self.contexts.forget(count)
        self.row.cut(count, self.networks.mc.block_size)
        self._is_current, self._context, self._cached = False, None, None
        self._seen = self.tree.version, self.tree.cuts

    def _notice_changes(self) -> None:
        """Account for an ingest, and for what another session did to the tree."""
        version, cuts = self._seen
        if self.tree.cuts != cuts:  # nobody knows how short it was in between
            self._forget(0)
        elif self.tree.version != version:  # what is cached still stands at the beginning
            self._is_current, self._context = False, None
            self._seen = self.tree.version, self.tree.cuts

    # Working context

    @property
    def context(self) -> Context | None:
        """The present context with its room; None where none was chosen since the last ingest."""
        self._notice_changes()
        return self._context

    def refocus(self) -> None:
        """Choose the context for the complete history, by the history alone; do nothing where that
        is the present one.
        """
        self._notice_changes()
        if not self._is_current and len(self):
            with self.networks.controller.inference():
                self._set(self.contexts.choose(self._window(len(self))), is_current=True)

    def restore(self, saved: SavedContext) -> None:
        """Take up a saved context of this history, to go on from it. Raises ConfigError where it
        cannot be one.
        """
        if not 1 <= saved.known <= len(self):
            raise saved.damaged(f"it is one of {saved.known} tokens, {len(self)} are there")
        try:
            window = self._window(saved.known, saved.first)
        except ValueError as error:
            raise saved.damaged(f"it begins at token {saved.first}: {error}") from None
        saved.check(window, self.networks.mc)
        self._set(
            Context(window, saved.lods, saved.starts, saved.rescored),
            is_current=False,
        )

    def working_context(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return LODs and first tokens of the entries of all known tokens; see
        `Session.working_context`.
        """
        if self.context is None:
            self.refocus()
        if self._context is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self._used > len(self._context.lods):
            self._follow(self._context)
        used = self._used
        return self._context.lods[:used].copy(), self._context.starts[:used].copy()

    # Asking

    @torch.no_grad()
    def losses(self, tokens: Tokens) -> Losses:
        """Return the loss of at most h tokens after the history, which stays as it was, as does the
        context. Raises ConfigError for no or too many.
        """
        networks = self.networks
        labels = torch.from_numpy(token_ids(tokens, self.tree.shape.vocab_size)).to(
            networks.device, torch.int64
        )
        horizon = networks.mc.horizon_tokens
        if not 1 <= len(labels) <= horizon:
            raise ConfigError(
                f"nll: {len(labels)} tokens do not fit the horizon: give 1 to horizon_tokens = "
                f"{horizon}"
            )
        before = self.context, self._tables, self._is_current
        hidden = self.begin(labels[:-1])
        with self.phases("decode"):
            logits = networks.backbone.head.logits(hidden)
            losses = Losses(
                F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels
            )
        if before[0] is not None:
            self._context, self._tables, self._is_current = before
        return losses

    # Steps of a generation

    def begin(self, extra: Tensor | None = None) -> Tensor:
        """Return final states [1 + n, D] of the last known token and n `extra` ones, after a
        refocus. Raises ConfigError for an empty history.
        """
        if not len(self):
            raise ConfigError("the session has no history: ingest at least one token first")
        self.refocus()
        return self._hidden(extra)

    def accept(self, token: int) -> None:
        """Make a generated token part of the history."""
        self._notice_changes()
        with self.phases("tree"):
            self.tree.append([token])
        self._is_current, self._seen = False, (self.tree.version, self.tree.cuts)

    @property
    def steps(self) -> bool:
        """Whether the last known token is the next entry of what is cached: then the decoder can
        step, else `state` must be asked.
        """
        return (
            self.context is not None
            and not self._due
            and self._cached is self._context
            and len(self.row.lods) == self._used - 1
        )

    def tables_at_end(self) -> tuple[Tensor, Tensor]:
        """Return rotary tables [1, C/2] of the entry of the last known token."""
        assert self._tables is not None
        place = self._used - 1
        return self._tables[0][place : place + 1], self._tables[1][place : place + 1]

    def stepped(self) -> None:
        """The decoder has appended the last known token."""
        assert self._context is not None
        used = self._used
        self.row.hold(self._context.lods[:used], self._context.starts[:used])

    def state(self) -> Tensor:
        """Return final state [1, D] of the last known token, after a refocus from the present
        context where one is due.
        """
        if self.context is None:  # something was ingested in the middle of a generation
            return self.begin()
        assert self._context is not None
        if self._due:
            self._follow(self._context)
        return self._hidden()

    # Parts

    def _follow(self, present: Context) -> None:
        """Refocus from the present context."""
        with self.networks.controller.inference():
            window = self._window(len(self), present.window.first)
            self._set(self.contexts.choose(window, present), is_current=False)

    @property
    def _due(self) -> bool:
        """Whether a refocus comes before the next entry: after K tokens, or when the room is used
        up.
        """
        assert self._context is not None
        mc = self.networks.mc
        return len(self) - self._context.window.known >= min(mc.block_size, mc.horizon_tokens)

    @property
    def _used(self) -> int:
        """Entries of the context that stand for known tokens."""
        assert self._context is not None
        return self._context.window.visible + 1 + len(self) - self._context.window.known

    def _window(self, known: int, first: int = 0) -> Window:
        """Return the window of the first `known` tokens of the history, from `first` on at the
        earliest.
        """
        mc, budget = self.networks.mc, self.settings.budget
        if POLICIES[self.settings.policy].needs is Needs.NOTHING:
            return recency_window(known, budget, mc)
        return window_of(known, budget, mc, first=first)

    def _set(self, context: Context, *, is_current: bool) -> None:
        mc, backbone = self.networks.mc, self.networks.backbone.config
        device = self.networks.device
        cos, sin = rotary_tables(
            torch.from_numpy(context.lods)[None].to(device),
            torch.from_numpy(context.starts)[None].to(device),
            block_size=mc.block_size,
            head_dim=backbone.head_dim,
            base=backbone.rope_base,
            scheme=mc.position_scheme,
        )
        self._context, self._tables, self._is_current = context, (cos[0], sin[0]), is_current

    @torch.no_grad()
    def _hidden(self, extra: Tensor | None = None) -> Tensor:
        """Return final states [1 + n, D] of the last known token and of n `extra` tokens after it,
        which are not kept.
        """
        assert self._context is not None
        assert self._tables is not None
        used, added = self._used, 0 if extra is None else extra.numel()
        lods, starts = self._context.lods[:used], self._context.starts[:used]
        keep = min(self.row.common(lods, starts), used - 1)
        with self.phases("tree"):
            entries = self.tree.entries(
                torch.from_numpy(lods[keep:]), torch.from_numpy(starts[keep:])
            )
            if extra is not None:
                entries = torch.cat([entries, self.tree.nets.embed(extra)])
        with self.phases("recompute"):
            self.row.hold(self.row.lods[:keep], self.row.starts[:keep])
            self._cached = None
            cos, sin = (table[keep : used + added] for table in self._tables)
            hidden = self.row.decoder.extend(self.row.row, entries, cos, sin, keep=keep)
        self.row.hold(lods, starts)
        self._cached = self._context
        return hidden[-1 - added :]
