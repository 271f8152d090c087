"""A session: one history of any length, read through a working context of at most `budget` entries.

    session = model.session(policy="lens", budget=2112, tree="ram")
    session.ingest(tokens); session.nll(answer); session.generate(max_new_tokens=32)

Tokens go into the tree; nothing else is done with them until something is asked. Then, on the complete history, the policy chooses a
context (see `window` for its room), the decoder's cache is kept up to the first entry that differs and recomputed behind it. While tokens
are generated this repeats every K tokens, from the present context.

Legend: H known tokens, h horizon, K block size, W entries, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.inference.decoding.decoder import Decoder
from mc_ds.inference.decoding.sampling import Sampling
from mc_ds.inference.phases import Phases
from mc_ds.inference.reading.contexts import Context, Heard, Policy
from mc_ds.inference.reading.window import Window, window_of
from mc_ds.inference.tree.tree import MegaContextTree, Tokens, token_ids
from mc_ds.model.positions import rotary_tables

if TYPE_CHECKING:
    from mc_ds.inference.model import InferenceModel


class Piece(NamedTuple):
    """One generated token."""

    row: int
    """Which of the sessions."""
    token: int
    text: str
    """Text that has become certain with it; stop strings are left out. Empty without a tokenizer."""


class Losses(NamedTuple):
    """What a session says of given tokens."""

    nll: Tensor
    """Next-token loss of each, float32 [n], nats."""
    correct: Tensor
    """Whether each was the likeliest, bool [n]."""


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


@dataclass
class Lane:
    """A session's place in the decoder: its row of a cache that several sessions may share, and what it holds."""

    decoder: Decoder
    row: int
    lods: NDArray[np.int64]
    """Of the cached entries, [n]."""
    starts: NDArray[np.int64]
    context: Context | None = None
    """Whose entries they are."""

    def common(self, lods: NDArray[np.int64], starts: NDArray[np.int64]) -> int:
        """Leading entries of a plan that are cached."""
        size = min(len(self.lods), len(lods))
        differ = (self.lods[:size] != lods[:size]) | (self.starts[:size] != starts[:size])
        return int(differ.argmax()) if differ.any() else size

    def hold(
        self, lods: NDArray[np.int64], starts: NDArray[np.int64], context: Context | None = None
    ) -> None:
        """These entries are what counts from now on; the cache holds them and perhaps more."""
        self.lods, self.starts, self.context = lods, starts, context
        self.decoder.lengths[self.row] = len(lods)


class Session:
    """One history and how it is read. Made by `InferenceModel.session`; for one thread."""

    def __init__(
        self,
        model: "InferenceModel",
        tree: MegaContextTree,
        policy: Policy,
        settings: Settings,
        decoder: Decoder,
        row: int,
        phases: Phases,
    ) -> None:
        self.model, self.tree, self.settings, self.phases = model, tree, settings, phases
        self._policy = policy
        none = np.empty(0, np.int64)
        self._lane = Lane(decoder, row, none, none)
        self._context: Context | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._is_answer = False
        """Whether the context was chosen for the complete history, by the history alone."""

    # History

    def __len__(self) -> int:
        """Known tokens H, generated ones included."""
        return len(self.tree)

    def ingest(self, tokens: Tokens) -> None:
        """Appends tokens to the history; a tree on disk has them durably when this returns.

        Raises ConfigError for ids outside the vocabulary, OSError where the disk is full (`len` then tells how many were taken).
        """
        before = len(self)
        try:
            with self.phases("ingest"):
                self.tree.append(tokens)
                self.tree.commit()
        finally:
            if len(self) != before:
                self._is_answer, self._context = False, None

    def truncate(self, count: int) -> None:
        """Forgets all tokens from `count` on. Raises ConfigError where there are fewer."""
        self.tree.truncate(count)
        self._policy.forget(count)
        kept = int(
            np.searchsorted(self._lane.starts + self._block**self._lane.lods, count, side="right")
        )
        self._lane.hold(self._lane.lods[:kept], self._lane.starts[:kept])
        self._is_answer, self._context = False, None

    def save(self, folder: str | Path) -> None:
        """Writes the session into a new folder, or in the place of one saved there before; `InferenceModel.load_session` reads it.

        A tree in memory is copied into the folder; one on disk is committed and stays where it is. Raises ConfigError for a folder that
        holds anything else.
        """
        from mc_ds.inference.store import save_session

        save_session(self, Path(folder))

    def close(self) -> None:
        """Commits a tree on disk and lets go of it."""
        self.tree.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Working context

    def refocus(self) -> None:
        """Chooses the working context for the complete history, by the history alone; does nothing where that is the present one."""
        if not self._is_answer and len(self):
            with self.model.controller.inference():
                self._set(self._policy.choose(self._window()), is_answer=True)

    def working_context(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """LODs and first tokens of the entries, at most `budget`, tokens generated since the last refocus included.

        After an `ingest` the context is first chosen anew; where generated tokens have used up its room, it follows them.
        """
        if self._context is None:
            self.refocus()
        if self._context is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self._used > len(self._context.lods):
            self._follow(self._context)
        used = self._used
        return self._context.lods[:used].copy(), self._context.starts[:used].copy()

    @property
    def coverage(self) -> float:
        """Share of the history's tokens that the working context represents, at any level of detail."""
        _, starts = self.working_context()
        return 1.0 - int(starts[0]) / len(self) if len(starts) else 1.0

    # Asking

    def nll(self, tokens: Tokens) -> float:
        """Mean next-token loss in nats of at most h tokens after the history, read at LOD0; the first is predicted by the last known token.

        The focus is chosen by the history alone, and the history stays as it was. Raises ConfigError for no or too many tokens.
        """
        return float(self.losses(tokens).nll.mean())

    @torch.no_grad()
    def losses(self, tokens: Tokens) -> Losses:
        """`nll`, token by token."""
        labels = torch.from_numpy(token_ids(tokens, self.tree.shape.vocab_size)).to(
            self.model.device, torch.int64
        )
        horizon = self.model.mc.horizon_tokens
        if not 1 <= len(labels) <= horizon:
            raise ConfigError(
                f"nll: {len(labels)} tokens do not fit the horizon: give 1 to horizon_tokens = {horizon}"
            )
        self._require_history()
        before = self._context, self._tables, self._is_answer
        self.refocus()
        hidden = self._hidden(labels[:-1])
        with self.phases("decode"):
            logits = self.model.model.backbone.head.logits(hidden)
            losses = Losses(
                F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels
            )
        if before[0] is not None:
            self._context, self._tables, self._is_answer = before
        return losses

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[int]:
        """Continues the history by at most `max_new_tokens` tokens, which become part of it, and returns them.

        Ends early after a token of `stop_ids`, or when a string of `stop` has been written (that needs the bundle's tokenizer).
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        return [
            piece.token
            for piece in self.stream(max_new_tokens, sampling, stop=stop, stop_ids=stop_ids)
        ]

    def stream(
        self,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """`generate`, token by token, each part of the history when it is given out. The last piece may have text alone."""
        return self.model.stream([self], max_new_tokens, sampling, stop=stop, stop_ids=stop_ids)

    # Steps of a generation, for mc_ds.inference.decoding.generation

    def accept(self, token: int) -> None:
        """Makes a generated token part of the history."""
        with self.phases("tree"):
            self.tree.append([token])
        self._is_answer = False

    @property
    def steps(self) -> bool:
        """Whether the last known token is the next entry of what is cached: then the decoder can step, else `state` must be asked."""
        lane = self._lane
        return (
            self._context is not None
            and not self._due
            and lane.context is self._context
            and len(lane.lods) == self._used - 1
        )

    def tables_at_end(self) -> tuple[Tensor, Tensor]:
        """Rotary tables [1, C/2] of the entry of the last known token."""
        assert self._tables is not None
        place = self._used - 1
        return self._tables[0][place : place + 1], self._tables[1][place : place + 1]

    def stepped(self) -> None:
        """The decoder has appended the last known token."""
        assert self._context is not None
        self._lane.hold(
            self._context.lods[: self._used], self._context.starts[: self._used], self._context
        )

    def begin(self) -> Tensor:
        """Final state [1, D] of the last known token, after a refocus on the complete history. Raises ConfigError for an empty one."""
        self._require_history()
        self.refocus()
        return self._hidden()

    def state(self) -> Tensor:
        """Final state [1, D] of the last known token, after a refocus from the present context where one is due."""
        if self._context is None:  # something was ingested in the middle of a generation
            return self.begin()
        if self._due:
            self._follow(self._context)
        return self._hidden()

    @property
    def lane(self) -> Lane:
        """The session's place in the decoder."""
        return self._lane

    # Parts

    @property
    def context(self) -> Context | None:
        """The present context with its room; None where none was chosen since the last ingest."""
        return self._context

    def restore(
        self,
        lods: NDArray[np.int64],
        starts: NDArray[np.int64],
        *,
        known: int,
        first: int,
        heard: Heard | None = None,
    ) -> None:
        """Takes up the context of a window, to go on from it."""
        self._set(Context(self._window(known, first), lods, starts, heard), is_answer=False)

    def _follow(self, present: Context) -> None:
        """Refocuses from the present context."""
        with self.model.controller.inference():
            self._set(
                self._policy.follow(self._window(first=present.window.first), present),
                is_answer=False,
            )

    @property
    def _due(self) -> bool:
        """Whether a refocus comes before the next entry: after K tokens, or when the room is used up."""
        assert self._context is not None
        return len(self) - self._context.window.known >= min(
            self._block, self.model.mc.horizon_tokens
        )

    @property
    def _block(self) -> int:
        return self.model.mc.block_size

    @property
    def _used(self) -> int:
        """Entries of the context that stand for known tokens."""
        assert self._context is not None
        return self._context.window.visible + 1 + len(self) - self._context.window.known

    def _window(self, known: int | None = None, first: int = 0) -> Window:
        """The window of the history, or of its first `known` tokens, from `first` on at the earliest."""
        known, horizon, budget = (
            len(self) if known is None else known,
            self.model.mc.horizon_tokens,
            self.settings.budget,
        )
        if self.settings.policy == "recency":
            return Window(
                known,
                first=0,
                length=min(known - 1 + horizon, budget),
                horizon=horizon,
                geometry=None,
            )
        return window_of(known, budget, self.model.mc, first=first)

    def _require_history(self) -> None:
        if not len(self):
            raise ConfigError("the session has no history: ingest at least one token first")

    def _set(self, context: Context, *, is_answer: bool) -> None:
        mc, backbone = self.model.mc, self.model.model.backbone.config
        device = self.model.device
        cos, sin = rotary_tables(
            torch.from_numpy(context.lods)[None].to(device),
            torch.from_numpy(context.starts)[None].to(device),
            block_size=mc.block_size,
            head_dim=backbone.head_dim,
            base=backbone.rope_base,
            scheme=mc.position_scheme,
        )
        self._context, self._tables, self._is_answer = context, (cos[0], sin[0]), is_answer

    @torch.no_grad()
    def _hidden(self, extra: Tensor | None = None) -> Tensor:
        """Final states [1 + n, D] of the last known token and of n `extra` tokens after it, which are not kept."""
        assert self._context is not None
        assert self._tables is not None
        used, added = self._used, 0 if extra is None else extra.numel()
        lods, starts = self._context.lods[:used], self._context.starts[:used]
        keep = min(self._lane.common(lods, starts), used - 1)
        with self.phases("tree"):
            entries = self.tree.entries(
                torch.from_numpy(lods[keep:]), torch.from_numpy(starts[keep:])
            )
            if extra is not None:
                entries = torch.cat([entries, self.tree.nets.embed(extra)])
        with self.phases("recompute"):
            self._lane.hold(self._lane.lods[:keep], self._lane.starts[:keep])
            cos, sin = (table[keep : used + added] for table in self._tables)
            hidden = self._lane.decoder.extend(self._lane.row, entries, cos, sin, keep=keep)
        self._lane.hold(lods, starts, self._context)
        return hidden[-1 - added :]
