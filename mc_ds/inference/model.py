"""`load_bundle` and `InferenceModel`: a trained model that creates sessions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch

from mc_ds.config import ConfigError, RetrievalConfig, RunConfig
from mc_ds.config.focus import FocusConfig
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.focus.controller import MCController
from mc_ds.inference.decoding.decoder import Decoder
from mc_ds.inference.decoding.ending import Ending
from mc_ds.inference.decoding.generation import Piece, stream
from mc_ds.inference.decoding.graphed import GraphedDecoder
from mc_ds.inference.decoding.row import CachedRow
from mc_ds.inference.decoding.sampling import Sampling
from mc_ds.inference.networks import Networks
from mc_ds.inference.phases import Phases
from mc_ds.inference.reader import Reader
from mc_ds.inference.reading.scorer import LensInput
from mc_ds.inference.session import Session
from mc_ds.inference.settings import Settings
from mc_ds.inference.store import read_session, tail_of
from mc_ds.inference.tree.disk import open_tree
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.device import check_dtype, device_of
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.model.recording import Capturing
from mc_ds.storage import path_of
from mc_ds.weights.open import open_weights

KEEP_PREFIX = 0.05
"""Default edit penalty at the beginning of a context during a generation. It falls linearly to 0 at
the end, since edits near the beginning invalidate more of the key/value cache.
"""
MAX_SESSIONS = 1 << 16
"""Largest number of sessions that share a decoder."""


def load_bundle(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
    cuda_graphs: bool | None = None,
) -> "InferenceModel":
    """Return the model of a bundle, or of any other weights that `open_weights` supports, on
    `device`.

    `dtype` is that of backbone and GistNet (None: see `Weights.load`); LensNet is float32.
    `verify=False` skips the verification of file hashes. `cuda_graphs`: see `InferenceModel`.
    Raises ConfigError if the weights cannot be opened.
    """
    path = path_of(path)
    device = device_of(device)
    check_dtype(dtype)
    _check_graphs(cuda_graphs, device)
    weights = open_weights(path, verify=verify)
    model, lensnet = weights.load(device=device, dtype=dtype)
    return InferenceModel(
        model,
        lensnet,
        weights.config,
        tokenizer=weights.tokenizer(),
        hashes=weights.tree_hashes(),
        cuda_graphs=cuda_graphs,
    )


def _check_graphs(cuda_graphs: bool | None, device: torch.device) -> None:
    """Raise ConfigError if CUDA graphs are requested and `device` has none."""
    if cuda_graphs not in (None, True, False):
        raise ConfigError(
            f"cuda_graphs = {cuda_graphs!r} is unknown: use True, False, or None (where possible)"
        )
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs = True needs a GPU, and the model is on {device}: load it with device = "
            "cuda, or leave cuda_graphs out"
        )


class InferenceModel:
    """A model in evaluation mode on one device, which creates sessions and holds what they
    share. Not thread-safe: one session at a time.
    """

    def __init__(
        self,
        model: MegaContextModel,
        lensnet: LensNet | None,
        config: RunConfig,
        *,
        tokenizer: Tokenizer | None = None,
        hashes: tuple[str, str] = ("", ""),
        cuda_graphs: bool | None = None,
    ) -> None:
        """`hashes` come from a bundle's manifest. They identify the weights of GistNet and of the
        index, so that a tree on disk is only read with the weights that made it.

        `cuda_graphs`: whether sessions launch the decoder's step, the recomputation of its cache,
        LensNet and the nodes of a block as CUDA graphs; default: on a GPU. Raises ConfigError for
        True on a device without CUDA.
        """
        self.model, self.lensnet = model.eval(), lensnet.eval() if lensnet is not None else None
        self.config, self.mc, self.tokenizer, self.hashes = config, config.mc, tokenizer, hashes
        self.device = model.backbone.embedding.weight.device
        _check_graphs(cuda_graphs, self.device)
        self.cuda_graphs = self.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        """Whether sessions launch CUDA graphs."""
        capturing = Capturing(self.device) if self.cuda_graphs else None
        self.nets = TreeNets.of(model, lensnet, capturing)
        self.controller = MCController(
            LensInput(lensnet, self.nets, capturing).eval() if lensnet is not None else None
        )

    def session(
        self,
        policy: str = "lens",
        budget: int | None = None,
        tree: str | Path | MegaContextTree = "ram",
        *,
        seed: int | tuple[int, ...] = 0,
        search: bool | int | None = None,
        tail: Sequence[int] | None = None,
        focus: FocusConfig | None = None,
        retrieval: RetrievalConfig | None = None,
        keep_prefix: float = KEEP_PREFIX,
        refocus: int | None = None,
        create: bool = True,
    ) -> Session:
        """Return a session over a new history, or over that of an existing `tree`: "ram", a folder,
        or a tree.

        * `budget`: largest number of entries of the working context; default: W of training.
        * `seed`: seed of the random policy; sampling combines it with the seed of a generation.
        * `search`: number of blocks of the whole history that a refocus adds as candidates; True
          means 32, 0 none. By default a search runs only in histories longer than those of
          training. It is skipped if every block is at LOD1 or LOD0 anyway, or if the coarsest
          cover leaves no room.
        * `tail`: tokens whose last ones LensNet reads instead of the visible tail: another
          question, or for `blind` an unrelated text (default: the middle of the history).
        * `focus`, `retrieval`: settings of focus allocator and retrieval; default: the bundle's.
        * `keep_prefix`: edit penalty at the beginning of the context during a generation.
        * `refocus`: number of tokens that a generation appends between refocuses, up to h; default:
          min(K, h).
        * `create`: whether to create a tree in a folder that has none.

        Raises ConfigError for an unknown policy, one that needs a network that the model lacks, a
        budget that is too small, and a tree on disk that other networks made.
        """
        settings = self._settings(
            policy, budget, focus, retrieval, seed, search, keep_prefix, refocus, tail=tail
        )
        return self.make([tree], [settings], create=create)[0]

    def sessions(
        self,
        count: int,
        policy: str = "lens",
        budget: int | None = None,
        *,
        seed: int | tuple[int, ...] = 0,
        search: bool | int | None = None,
        focus: FocusConfig | None = None,
        retrieval: RetrievalConfig | None = None,
        keep_prefix: float = KEEP_PREFIX,
        refocus: int | None = None,
    ) -> list[Session]:
        """Return `count` sessions with trees in memory that share a decoder, so that `stream` and
        `generate` continue them in one batch.

        Row r has the seed (*seed, r), so that equal prompts are continued differently. The options
        are those of `session`.
        """
        if not isinstance(count, Integral) or not 1 <= count <= MAX_SESSIONS:
            raise ConfigError(
                f"count = {count!r} sessions cannot be created: use 1 to {MAX_SESSIONS}"
            )
        settings = self._settings(
            policy, budget, focus, retrieval, seed, search, keep_prefix, refocus
        )
        return self.make(
            ["ram"] * count, [replace(settings, seed=(*settings.seed, row)) for row in range(count)]
        )

    def load_session(self, folder: str | Path) -> Session:
        """Return the session that `Session.save` wrote to `folder`. Its context is chosen anew if
        the bundle that saved it had another tail or horizon. Raises ConfigError if there is none,
        or it was saved with another model.
        """
        folder = path_of(folder)
        saved = read_session(folder)
        if saved.hashes != self.hashes:
            raise ConfigError(
                f"the session {folder} was saved with another model: load it with that model's "
                "bundle"
            )
        tree = self.open_tree(saved.tree, create=False)
        try:
            if len(tree) < saved.tokens:
                raise ConfigError(
                    f"the tree of the session {folder} has {len(tree)} tokens, but had "
                    f"{saved.tokens} when it was saved: restore {saved.tree} from a copy"
                )
            if saved.tree_inside:
                in_memory = self.open_tree("ram")
                tree.copy_into(in_memory)
                tree.close()
                tree = in_memory
            session = self.make([tree], [saved.settings])[0]
            same_tail = saved.tail in (None, tail_of(self.mc))
            if saved.context is not None and len(tree) == saved.tokens and same_tail:
                session.reader.restore(saved.context)
        except BaseException:
            tree.close()
            raise
        return session

    def stream(
        self,
        sessions: Sequence[Session],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """Continue sessions that share a decoder, token by token. See `Session.generate`."""
        if not isinstance(sessions, Sequence) or not all(
            isinstance(session, Session) for session in sessions
        ):
            raise ConfigError(f"sessions = {sessions!r} is not a list of sessions: give one")
        return stream(
            [session.reader for session in sessions],
            Ending(max_new_tokens, stop, stop_ids),
            sampling or Sampling(),
            decode=self.tokenizer.decode if self.tokenizer is not None else None,
        )

    def generate(
        self,
        sessions: Sequence[Session],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Return the tokens that continue each of the sessions, which must share a decoder."""
        pieces = self.stream(sessions, max_new_tokens, sampling, stop=stop, stop_ids=stop_ids)
        ids: list[list[int]] = [[] for _ in sessions]
        for piece in pieces:
            ids[piece.row].append(piece.token)
        return ids

    def open_tree(self, where: str | Path, *, create: bool = True) -> MegaContextTree:
        """Return a tree of this model: a new one in memory if `where` is "ram", else the one in
        that folder, which is created if it is missing and `create` is set.
        """
        return open_tree(
            path_of(where),
            self.nets,
            gistnet_hash=self.hashes[0],
            index_hash=self.hashes[1],
            create=create,
        )

    def make(
        self,
        trees: Sequence[str | Path | MegaContextTree],
        settings: Sequence[Settings],
        *,
        create: bool = True,
    ) -> list[Session]:
        """Return one session per tree. They share a decoder, so their budgets must be equal."""
        networks = Networks(self.mc, self.model.backbone, self.nets, self.lensnet, self.controller)
        for row_settings in settings:
            row_settings.check(networks)
        kind = GraphedDecoder if self.cuda_graphs else Decoder
        decoder = kind(self.model.backbone, rows=len(trees), capacity=settings[0].budget)
        phases = Phases(self.device)
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        sessions = []
        for row, (where, row_settings) in enumerate(zip(trees, settings, strict=True)):
            tree = self._tree(where, create=create)
            reader = Reader(networks, tree, row_settings, CachedRow(decoder, row), phases)
            sessions.append(Session(reader, decode=decode, hashes=self.hashes))
        return sessions

    def _tree(self, where: str | Path | MegaContextTree, *, create: bool) -> MegaContextTree:
        if isinstance(where, str | Path):
            return self.open_tree(where, create=create)
        if not isinstance(where, MegaContextTree):
            raise ConfigError(f'tree = {where!r} is not a tree: give "ram", a folder, or a tree')
        where.require_open()
        if not self.nets.same_as(where.nets):
            raise ConfigError(
                "this tree was made by another model: ingest its tokens into a tree of this model"
            )
        return where

    def _settings(
        self,
        policy: str,
        budget: int | None,
        focus: FocusConfig | None,
        retrieval: RetrievalConfig | None,
        seed: int | tuple[int, ...],
        search: bool | int | None,
        keep_prefix: float,
        refocus: int | None,
        *,
        tail: Sequence[int] | None = None,
    ) -> Settings:
        """Return session settings with the model's defaults filled in."""
        return Settings(
            policy=policy,
            budget=self.mc.train_wc_length if budget is None else budget,
            focus=self.config.focus if focus is None else focus,
            retrieval=self.config.retrieval if retrieval is None else retrieval,
            seed=seed if isinstance(seed, tuple) else (seed,),
            search=search,
            tail=tuple(tail) if isinstance(tail, Iterable) else tail,
            keep_prefix=keep_prefix,
            refocus=refocus,
        )
