"""Reads one history: keeps its working context and its row of the decoder's cache up to date.

At a refocus the policy chooses a context (`window` determines its length). The decoder's cache is
kept up to the first entry that changed and recomputed after it. During a generation this happens
every r tokens, starting from the current context.

Legend: H known tokens, h horizon, r tokens between refocuses, W entries, D width, C channels per
head.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.focus.policies import Needs
from mc_ds.inference.decoding.decoder import Tables
from mc_ds.inference.decoding.row import CachedRow
from mc_ds.inference.networks import Networks
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.contexts import Context, Contexts
from mc_ds.inference.reading.saved import SavedContext
from mc_ds.inference.reading.window import Window, block_window, recency_window, window_of
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.tree import MegaContextTree, Tokens, token_ids
from mc_ds.model.positions import rotary_tables


class Losses(NamedTuple):
    """A session's losses on given tokens."""

    nll: Tensor
    """Next-token loss of each token in nats, float32 [n]."""
    correct: Tensor
    """Whether each token had the highest probability, bool [n]."""


class Reader:
    """A tree, its working context, and its row of a decoder. Not thread-safe."""

    def __init__(
        self,
        networks: Networks,
        tree: MegaContextTree,
        settings: Settings,
        row: CachedRow,
        phases: Phases,
    ) -> None:
        self.networks, self.tree, self.settings, self.phases = networks, tree, settings, phases
        self.row, self.budget = row, settings.budget
        self.contexts = Contexts(networks, tree, settings, phases)
        self._context: Context | None = None
        self._tables: Tables | None = None
        self._cached: Context | None = None
        """The context whose entries are in the row's cache."""
        self._seen = tree.version, tree.cuts
        """`version` and `cuts` of the tree that context and cache correspond to."""
        self._is_current = False
        """Whether the context was chosen from the complete history alone, not by editing an earlier
        context.
        """

    # History

    def __len__(self) -> int:
        """Return the number of known tokens H, generated ones included."""
        return len(self.tree)

    def truncate(self, count: int) -> None:
        """Remove all tokens after the first `count`. Raises ConfigError if the history is
        shorter.
        """
        self._notice_changes()
        self.tree.truncate(count)
        self._forget(count)

    def _forget(self, count: int) -> None:
        """Discard what depends on tokens after the first `count`."""
        self.contexts.forget(count)
        self.row.cut(count, self.networks.mc.block_size)
        self._is_current, self._context, self._cached = False, None, None
        self._seen = self.tree.version, self.tree.cuts

    def _notice_changes(self) -> None:
        """Invalidate context and cache if tokens were ingested or another session changed the
        tree.
        """
        version, cuts = self._seen
        if self.tree.cuts != cuts:  # the shortest length in between is unknown
            self._forget(0)
        elif self.tree.version != version:  # tokens were only added: cached entries stay valid
            self._is_current, self._context = False, None
            self._seen = self.tree.version, self.tree.cuts

    # Working context

    def set_budget(self, budget: int) -> None:
        """Use at most `budget` entries from the next refocus on. Raises ConfigError for more than
        the session was created with, and for too few.
        """
        if budget == self.budget:
            return
        if budget > self.settings.budget:
            raise ConfigError(
                f"budget = {budget} exceeds the budget that the session was created with: use at "
                f"most {self.settings.budget}"
            )
        replace(self.settings, budget=budget).check(self.networks)
        self.budget, self._is_current, self._context = budget, False, None

    @property
    def context(self) -> Context | None:
        """The current context, including its room for new tokens; None after an ingest until one is
        chosen.
        """
        self._notice_changes()
        return self._context

    def refocus(self) -> None:
        """Choose a context from the complete history alone. Does nothing if the current context was
        chosen this way.
        """
        self._notice_changes()
        if not self._is_current and len(self):
            self._choose(None)

    def restore(self, saved: SavedContext) -> None:
        """Continue with a saved context. Raises ConfigError if it cannot be one of this history."""
        if not 1 <= saved.known <= len(self):
            raise saved.damaged(f"it covers {saved.known} tokens, but the history has {len(self)}")
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
        """Return LODs and first tokens of the entries of all known tokens. See
        `Session.working_context`.
        """
        if self.context is None:
            self.refocus()
        if self._context is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self._used > len(self._context.lods):
            self._choose(self._context)
        used = self._used
        return self._context.lods[:used].copy(), self._context.starts[:used].copy()

    # Losses

    @torch.no_grad()
    def losses(self, tokens: Tokens) -> Losses:
        """Return the losses of 1 to h tokens that follow the history, without changing history or
        context. Raises ConfigError for no or too many tokens.
        """
        networks = self.networks
        labels = torch.from_numpy(token_ids(tokens, self.tree.shape.vocab_size)).to(
            networks.device, torch.int64
        )
        horizon = networks.mc.horizon_tokens
        if not 1 <= len(labels) <= horizon:
            raise ConfigError(
                f"nll: {len(labels)} tokens do not fit in the horizon: give 1 to horizon_tokens = "
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
        """Refocus, and return the final states [1 + n, D] of the last known token and of n `extra`
        tokens. Raises ConfigError for an empty history.
        """
        if not len(self):
            raise ConfigError("the session has no history: ingest at least one token first")
        self.refocus()
        return self._hidden(extra)

    def accept(self, token: int) -> None:
        """Append a generated token to the history."""
        self._notice_changes()
        completes_block = (len(self) + 1) % self.tree.shape.block_size == 0
        # Other tokens only extend a list, which takes less time than it takes to measure it.
        phase = self.phases("tree") if completes_block else nullcontext()
        with phase:
            self.tree.append([token])
        self._is_current, self._seen = False, (self.tree.version, self.tree.cuts)

    @property
    def can_step(self) -> bool:
        """Whether only the last known token is missing in the cache, so that a decoder step
        suffices; otherwise call `state`.
        """
        return (
            self.context is not None
            and not self._due
            and self._cached is self._context
            and len(self.row.lods) == self._used - 1
        )

    @property
    def tables(self) -> Tables:
        """The rotary tables [W, C/2] of the current context's entries."""
        assert self._tables is not None
        return self._tables

    def record_step(self) -> None:
        """Record that a decoder step added the last known token to the cache."""
        assert self._context is not None
        used = self._used
        self.row.set_entries(self._context.lods[:used], self._context.starts[:used])

    def state(self) -> Tensor:
        """Return the final state [1, D] of the last known token. If a refocus is due, the current
        context is edited first.
        """
        if self.context is None:  # tokens were ingested during the generation
            return self.begin()
        assert self._context is not None
        if self._due:
            self._choose(self._context)
        return self._hidden()

    # Internals

    def _choose(self, present: Context | None) -> None:
        """Refocus: edit the context `present`, or choose one from the history alone."""
        with self.phases("allocator"), self.networks.controller.inference():
            first = 0 if present is None else present.window.first
            context = self.contexts.choose(self._window(len(self), first), present)
        self._set(context, is_current=present is None)

    @property
    def _due(self) -> bool:
        """Whether a refocus must precede the next entry: the context got r tokens."""
        assert self._context is not None
        interval = self.settings.interval(self.networks.mc)
        return len(self) - self._context.window.known >= interval

    @property
    def _used(self) -> int:
        """Number of entries of the context that represent known tokens."""
        assert self._context is not None
        return self._context.window.visible + 1 + len(self) - self._context.window.known

    def _window(self, known: int, first: int = 0) -> Window:
        """Return the window of the first `known` tokens of the history, beginning at token `first`
        or later.
        """
        mc, budget = self.networks.mc, self.budget
        policy = self.settings.spec
        if policy.omits(mc):
            return block_window(known, budget, mc)
        if policy.needs is Needs.NOTHING:
            return recency_window(known, budget, mc)
        return window_of(known, budget, mc, first=first)

    def _set(self, context: Context, *, is_current: bool) -> None:
        mc, backbone = self.networks.mc, self.networks.backbone.config
        with self.phases("recompute"):
            cos, sin = rotary_tables(
                torch.from_numpy(context.lods)[None],
                torch.from_numpy(context.starts)[None],
                block_size=mc.block_size,
                head_dim=backbone.head_dim,
                base=backbone.rope_base,
                scheme=mc.position_scheme,
                device=self.networks.device,
            )
        self._context, self._tables, self._is_current = context, (cos[0], sin[0]), is_current

    @torch.no_grad()
    def _hidden(self, extra: Tensor | None = None) -> Tensor:
        """Return the final states [1 + n, D] of the last known token and of n `extra` tokens after
        it. The extra tokens do not stay in the cache.
        """
        assert self._context is not None
        assert self._tables is not None
        used, added = self._used, 0 if extra is None else extra.numel()
        lods, starts = self._context.lods[:used], self._context.starts[:used]
        with self.phases("recompute"):
            # Keep the unchanged prefix of the cache; recompute at least the last known token.
            cached = min(self.row.common_prefix(lods, starts), used - 1)
            keep = self.row.decoder.kept(cached, used + added)
            with self.phases("tree"):
                entries = self.tree.entries(
                    torch.from_numpy(lods[keep:]), torch.from_numpy(starts[keep:])
                )
                if extra is not None:
                    entries = torch.cat([entries, self.tree.nets.embed(extra)])
            self.row.set_entries(self.row.lods[:keep], self.row.starts[:keep])
            self._cached = None
            cos, sin = (table[keep : used + added] for table in self._tables)
            hidden = self.row.decoder.extend(
                self.row.row, entries, cos, sin, keep=keep, last=1 + added
            )
        self.row.set_entries(lods, starts)
        self._cached = self._context
        return hidden
