"""A session: one history of any length, read through a working context of at most `budget` entries.

    session = model.session(policy="lens", budget=2112, tree="ram")
    session.ingest(tokens); session.nll(answer); session.generate(max_new_tokens=32)

Ingested tokens only enter the tree. A context is chosen when a loss or a generation needs one.

Legend: H known tokens, h horizon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import MCConfig
from mc_ds.inference.decoding.ending import Ending
from mc_ds.inference.decoding.generation import Piece, stream
from mc_ds.inference.decoding.sampling import Sampling
from mc_ds.inference.decoding.text import Decode
from mc_ds.inference.phases import Phases
from mc_ds.inference.reader import Losses, Reader
from mc_ds.inference.settings import Settings
from mc_ds.inference.store import save_session, tail_of
from mc_ds.inference.tree.tree import MegaContextTree, Tokens
from mc_ds.storage import path_of


class Session:
    """One history and its reader, created by `InferenceModel.session`. Not thread-safe."""

    def __init__(self, reader: Reader, *, decode: Decode | None, hashes: tuple[str, str]) -> None:
        """`decode` is the tokenizer's, None without a tokenizer. `hashes`, from a bundle's
        manifest, identify the weights.
        """
        self.reader, self._decode, self._hashes = reader, decode, hashes

    @property
    def settings(self) -> Settings:
        """The settings that the session was created with."""
        return self.reader.settings

    @property
    def mc(self) -> MCConfig:
        """The model's MegaContext settings."""
        return self.reader.networks.mc

    @property
    def tree(self) -> MegaContextTree:
        """The tree of the history."""
        return self.reader.tree

    @property
    def phases(self) -> Phases:
        """The time spent in each phase."""
        return self.reader.phases

    # History

    def __len__(self) -> int:
        """Return the number of known tokens H, generated ones included."""
        return len(self.tree)

    def ingest(self, tokens: Tokens) -> None:
        """Append tokens to the history. If the tree is on disk, they are durable when this returns.

        Raises ConfigError for ids outside the vocabulary, and OSError if the disk is full; `len`
        then tells how many tokens were appended.
        """
        with self.phases("ingest"):
            self.tree.append(tokens)
            self.tree.commit()

    def truncate(self, count: int) -> None:
        """Remove all tokens after the first `count`. Raises ConfigError if the history is
        shorter.
        """
        self.reader.truncate(count)

    def save(self, folder: str | Path) -> None:
        """Save the session to `folder`, which is new or holds a saved session, which is
        overwritten. `InferenceModel.load_session` loads it.

        A tree in memory is copied into the folder; a tree on disk is committed and referred to by
        its path. Raises ConfigError for a folder with other files.
        """
        save_session(
            path_of(folder),
            self.tree,
            replace(self.settings, budget=self.budget),
            context=self.reader.context,
            hashes=self._hashes,
            tail=tail_of(self.mc),
        )

    def close(self) -> None:
        """Commit a tree on disk and close it."""
        self.tree.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Working context

    @property
    def budget(self) -> int:
        """Largest number of entries W of the working context. Can be set, up to its value at
        creation; the context is then chosen anew.
        """
        return self.reader.budget

    @budget.setter
    def budget(self, budget: int) -> None:
        self.reader.set_budget(budget)

    def refocus(self) -> None:
        """Choose a context from the complete history alone. Does nothing if the current context was
        chosen this way.
        """
        self.reader.refocus()

    def working_context(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return LODs and first tokens of the entries, at most `budget` of them, including tokens
        generated since the last refocus.

        Refocuses first if tokens were ingested, or generated tokens have used up the context's
        room.
        """
        return self.reader.working_context()

    @property
    def coverage(self) -> float:
        """Fraction of the history's tokens that the working context covers, at any level of
        detail.
        """
        lods, _ = self.working_context()
        return int((self.mc.block_size**lods).sum()) / len(self) if len(lods) else 1.0

    # Losses and generation

    def nll(self, tokens: Tokens) -> float:
        """Return the mean next-token loss, in nats, of 1 to h tokens that follow the history. They
        are read at LOD0; the last known token predicts the first of them.

        The context is chosen from the history alone, and the history is not changed. Raises
        ConfigError for no or too many tokens.
        """
        return float(self.losses(tokens).nll.mean())

    def losses(self, tokens: Tokens) -> Losses:
        """Return the loss of each token; `nll` returns their mean."""
        return self.reader.losses(tokens)

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[int]:
        """Generate at most `max_new_tokens` tokens, append them to the history and return them.

        Sampling is reproducible: each draw depends on `seed`, the session's seed and the token's
        position in the history. Generation ends early after a token of `stop_ids`, and when the
        text contains a string of `stop` (which needs a tokenizer).
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
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """Yield the tokens of `generate` one by one, each after it was appended to the history."""
        return stream(
            [self.reader],
            Ending(max_new_tokens, stop, stop_ids),
            sampling or Sampling(),
            decode=self._decode,
        )
