"""The MegaContext tree of one history: tokens, and a gist and an index vector for every complete
node above them.

    tree.append(tokens); tree.gists(1, nodes); tree.entries(lods, starts); tree.index_table(1)

Node (l, j) covers tokens [j K^l, (j+1) K^l) and exists once all of these do, so the number of
tokens determines all nodes. Appending a token is a list operation; every K-th one computes the
nodes that it completes. Bulk appends compute nodes in batches of blocks, so that memory does not
depend on the number of tokens appended at once. `truncate` removes tokens.

Returned tables and views must not be written to, and are valid until the next `append` or
`truncate`. A tree is not thread-safe.

Legend: T tokens, n any number, W entries, K block size, L coarsest level, D width of gists, I width
of index vectors, n_l nodes at level l. Source: docs/inference.md, "Inference".
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.rows import Rows
from mc_ds.model.lensnet import sum_children

BATCH_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Number of elements in the embeddings of one batch of a bulk append, per device type. Activations
take 20 to 30 times as much.
"""
COPY_BYTES = 2**26
"""Bytes per step when one tree is copied into another."""

Tokens = Sequence[int] | Tensor | NDArray[Any]


class MegaContextTree(ABC):
    """The tree of one history. Subclasses provide the rows that store tokens, gists and index
    vectors of levels 1 .. L.
    """

    def __init__(
        self,
        nets: TreeNets,
        tokens: Rows,
        gists: list[Rows],
        index: list[Rows],
        *,
        count: int = 0,
        batch_tokens: int | None = None,
    ) -> None:
        """`count` is the number of tokens already in the rows; `batch_tokens` the size of a batch
        in bulk appends, rounded down to whole blocks.
        """
        self.nets, self.shape, self.device = nets, nets.shape, nets.device
        batch = (
            batch_tokens
            or BATCH_ELEMENTS.get(self.device.type, BATCH_ELEMENTS["cuda"]) // self.shape.dim
        )
        self._batch = max(1, batch // self.shape.block_size) * self.shape.block_size
        self._tokens, self._gists, self._index = tokens, gists, index
        self._closed = False
        self.version = 0
        """Number of changes so far; a different number means that the history may have changed."""
        self.cuts = 0
        """Number of changes that removed tokens."""
        self._pending: list[int] = []
        """Tokens after the last whole block."""
        self._load(count)

    # Growing

    def append(self, tokens: Tokens) -> None:
        """Add any number of token ids and compute the nodes they complete.

        Raises ConfigError for ids outside the vocabulary, without adding any; OSError if the disk
        is full: `len` then tells how many tokens were added, and the rest can be appended later.
        """
        ids = token_ids(tokens, self.shape.vocab_size)
        if not len(ids):
            return
        self._require_writable()
        self.version += 1
        if len(self._pending) + len(ids) < self.shape.block_size:
            self._pending += ids.tolist()
            return
        ids = np.concatenate([np.asarray(self._pending, dtype=np.int32), ids])
        done, whole = 0, len(ids) // self.shape.block_size * self.shape.block_size
        while done < whole:
            # Batches start at multiples of their size, so results do not depend on earlier calls.
            room = self._batch - self._whole % self._batch
            step = min(room, whole - done)
            self._add_blocks(torch.from_numpy(ids[done : done + step]))
            done += step
            self._pending, self._written = [], self._whole
            self._after_batch()
        self._pending = ids[whole:].tolist()

    def truncate(self, count: int) -> None:
        """Remove all tokens after the first `count` and the nodes that contain them. The removal of
        committed tokens is durable. Raises ConfigError if there are fewer tokens.
        """
        self.require_open()
        if not isinstance(count, Integral) or not 0 <= count <= len(self):
            raise ConfigError(
                f"a tree of {len(self)} tokens cannot be cut to {count!r}: use 0 to {len(self)}"
            )
        if count < len(self):
            self._require_writable()
            self._before_cut(count)
            self.version, self.cuts = self.version + 1, self.cuts + 1
        self._write_pending()
        self._load(count)

    def copy_into(self, other: "MegaContextTree") -> None:
        """Copy all tokens and nodes into `other`, without running the networks. Raises ConfigError
        unless `other` is empty and has the same shape.
        """
        self.require_open()
        if len(other) or other.shape != self.shape:
            raise ConfigError(
                f"cannot copy a tree of {self.shape} into one of {len(other)} tokens and "
                f"{other.shape}: give an empty tree of the same shape"
            )
        self._write_pending()
        tables = [(self._tokens, other._tokens, len(self))]
        for level, *rows in zip(
            range(1, self.shape.max_lod + 1),
            self._gists,
            other._gists,
            self._index,
            other._index,
            strict=True,
        ):
            tables += [
                (rows[0], rows[1], self.level_len(level)),
                (rows[2], rows[3], self.level_len(level)),
            ]
        for source, target, count in tables:
            step = max(1, COPY_BYTES // max(1, source.row_bytes))
            for first in range(0, count, step):
                target.write(first, source.between(first, min(first + step, count)))
        other._load(len(self))

    # Reading

    def __len__(self) -> int:
        return self._whole + len(self._pending)

    def level_len(self, level: int) -> int:
        """Return the number of nodes at `level`; at level 0, the number of tokens."""
        return len(self) // self.shape.span(level)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Return token ids [start, stop), int64 [n] on the tree's device."""
        self.require_open()
        if not 0 <= start <= stop <= len(self):
            raise ConfigError(
                f"tokens {start} to {stop} do not exist: the tree has {len(self)} tokens"
            )
        self._write_pending()
        return self._ids(self._tokens.between(start, stop))

    def tokens_at(self, positions: Tensor) -> Tensor:
        """Return token ids at `positions` [n] int64, each below `len`; int64 [n] on the tree's
        device.
        """
        self.require_open()
        self._write_pending()
        return self._ids(self._tokens.at(self._existing(0, positions)))

    def gists(self, level: int, nodes: Tensor) -> Tensor:
        """Return gists [n, D] of `nodes` [n] int64, each below `level_len(level)`, on the tree's
        device; level >= 1.
        """
        self.require_open()
        return self._gists[level - 1].at(self._existing(level, nodes)).to(self.device)

    def index(self, level: int, nodes: Tensor) -> Tensor:
        """Return index vectors [n, I] of `nodes` [n], float32 on the tree's device; level >= 1."""
        self.require_open()
        return self._index[level - 1].at(self._existing(level, nodes)).to(self.device)

    def index_table(self, level: int, first: int = 0, last: int | None = None) -> Tensor:
        """Return the index vectors [n, I] of nodes [first, last) of a level (default: all) as a
        view of the tree's storage, on its device or in a mapped file.

        While the view exists, a disk tree's pages stay in memory: read long histories in slices.
        """
        self.require_open()
        return self._index[level - 1].between(
            first, self.level_len(level) if last is None else last
        )

    def entries(self, lods: Tensor, starts: Tensor) -> Tensor:
        """Return the entries [W, D] of one row of a plan (`lods`, `starts` [W], W >= 1, preferably
        on the CPU): embedded tokens and gists, on the tree's device.
        """
        return self._gather(lods, starts, lambda lod0: (lod0,), self._gists)[0]

    def indexed_entries(self, lods: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entries [W, D] of one row of a plan and their index vectors [W, I], float32,
        on the tree's device. Arguments as in `entries`.
        """
        entries, index = self._gather(
            lods,
            starts,
            lambda lod0: (lod0, self.nets.token_index(lod0)),
            self._gists,
            self._index,
        )
        return entries, index

    # Durability

    @abstractmethod
    def commit(self) -> None:
        """Make all tokens durable if the tree is on disk."""

    def require_open(self) -> None:
        """Raise ConfigError if the tree was closed."""
        if self._closed:
            raise ConfigError("this tree is closed: open it again")

    def close(self) -> None:
        """Commit, and close all files, also if the commit fails: then its error is raised. The tree
        cannot be used afterwards.
        """
        try:
            self.commit()
        finally:
            self._release()

    def __enter__(self) -> "MegaContextTree":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        self._closed = True

    @abstractmethod
    def _after_batch(self) -> None:
        """Called after every batch of whole blocks."""

    # Internals

    def _before_cut(self, count: int) -> None:  # noqa: B027 (nothing to do in memory)
        """Called before the tokens after the first `count` are removed."""

    def _require_writable(self) -> None:
        """Raise ConfigError if the tree cannot be changed."""
        self.require_open()

    def _load(self, count: int) -> None:
        """Set the tree to the first `count` tokens of the rows."""
        self._whole = count // self.shape.block_size * self.shape.block_size
        self._pending = self._tokens.between(self._whole, count)[:, 0].tolist()
        self._written = count

    def _ids(self, rows_n1: Tensor) -> Tensor:
        """Return tokens from the host as ids int64 [n] on the tree's device, without waiting for
        it: a copy from memory that is not pinned has been read when the call returns.
        """
        return rows_n1[:, 0].to(self.device, torch.int64, non_blocking=True)

    def _existing(self, level: int, nodes: Tensor) -> Tensor:
        """Return `nodes`. Raises ConfigError if one does not exist; not checked for tensors on an
        accelerator, which would have to synchronise.
        """
        if nodes.device.type == "cpu" and nodes.numel():
            self._require(level, *map(int, nodes.aminmax()))
        return nodes

    def _require(self, level: int, low: int, high: int) -> None:
        """Raise ConfigError if nodes `low` to `high` of a level do not all exist."""
        if low < 0 or high >= self.level_len(level):
            raise ConfigError(
                f"node {low if low < 0 else high} of level {level} does not exist: the tree has "
                f"{self.level_len(level)} at this level"
            )

    def _write_pending(self) -> None:
        """Write the tokens of the unfinished block to the rows, so that they can be read."""
        if self._written < len(self):
            new = self._pending[self._written - self._whole :]
            self._tokens.write(self._written, torch.tensor(new, dtype=torch.int32)[:, None])
            self._written = len(self)

    def _add_blocks(self, ids: Tensor) -> None:
        """Add whole blocks of tokens, int32 [n], as one batch. They are counted only after
        everything is written, so that a failed call can be repeated.
        """
        first, last = self._whole, self._whole + len(ids)
        self._tokens.write(self._written, ids[self._written - first :, None])
        for level in range(1, self.shape.max_lod + 1):
            start, stop = first // self.shape.span(level), last // self.shape.span(level)
            if start == stop:
                break
            gists, index = (
                self.nets.blocks(self._ids(ids[:, None]))
                if level == 1
                else self._nodes(level, start, stop)
            )
            self._gists[level - 1].write(start, gists)
            self._index[level - 1].write(start, index)
        self._whole = last

    def _nodes(self, level: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the gists and index vectors of nodes [first, last) of a level above LOD1, computed
        from the level below.
        """
        block = self.shape.block_size
        gists, index = (
            rows[level - 2].between(first * block, last * block).to(self.device)
            for rows in (self._gists, self._index)
        )
        return (
            self.nets.gists(gists.unflatten(0, (-1, block)), level),
            sum_children(index[None], block)[0],
        )

    def _gather(
        self,
        lods: Tensor,
        starts: Tensor,
        of_tokens: Callable[[Tensor], tuple[Tensor, ...]],
        *of_levels: list[Rows],
    ) -> tuple[Tensor, ...]:
        """Return tables with one row for every entry of a plan. `of_tokens` returns those of
        embedded tokens, `of_levels` have the rows of each level's nodes.
        """
        self.require_open()
        self._write_pending()
        level_of, first_of = lods.cpu().numpy(), starts.cpu().long().numpy()
        found: tuple[Tensor, ...] = ()
        for level in range(self.shape.max_lod + 1):
            places = np.flatnonzero(level_of == level)
            if len(places):
                run = _run(places)
                nodes = first_of[places if run is None else run] // self.shape.span(level)
                if level == 0:
                    (ids,) = self._rows_at(level, nodes, self._tokens)
                    tables = of_tokens(self.nets.embed(self._ids(ids)))
                else:
                    rows = self._rows_at(level, nodes, *(table[level - 1] for table in of_levels))
                    tables = tuple(part.to(self.device) for part in rows)
                if len(places) == len(lods):  # of consecutive nodes, the rows are the tree's own
                    return tuple(part.clone() for part in tables) if level and run else tables
                found = found or tuple(x.new_empty(len(lods), x.size(1)) for x in tables)
                where = run or torch.from_numpy(places).to(self.device, non_blocking=True)
                for whole, part in zip(found, tables, strict=True):
                    whole[where] = part
        return found

    def _rows_at(self, level: int, nodes: NDArray[np.int64], *tables: Rows) -> list[Tensor]:
        """Return the rows of `nodes` [n], n >= 1, of a level: views of the tables if the nodes are
        consecutive.
        """
        run = _run(nodes)
        if run is None:
            at = self._existing(level, torch.from_numpy(nodes))
            return [rows.at(at) for rows in tables]
        self._require(level, run.start, run.stop - 1)
        return [rows.between(run.start, run.stop) for rows in tables]


def _run(numbers: NDArray[np.int64]) -> slice | None:
    """Return `numbers` [n], n >= 1, as a slice, so that they need not be copied to a device; None
    if they are not consecutive.
    """
    first, last = int(numbers[0]), int(numbers[-1])
    is_run = last - first + 1 == len(numbers) and bool((numbers[1:] - numbers[:-1] == 1).all())
    return slice(first, last + 1) if is_run else None


def token_ids(tokens: Tokens, vocab_size: int) -> NDArray[np.int32]:
    """Return token ids as int32 [n]. Raises ConfigError unless all are ids of the vocabulary."""
    if isinstance(tokens, Tensor) and tokens.dtype.is_floating_point:
        raise ConfigError(
            f"tokens of type {tokens.dtype} cannot be added: give a flat sequence of token ids"
        )
    try:
        values = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
    except ValueError:  # sequences of several lengths
        raise ConfigError(
            "tokens are not one sequence of numbers: give a flat sequence of token ids"
        ) from None
    if values.size == 0:
        return np.empty(0, dtype=np.int32)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ConfigError(
            f"tokens of shape {values.shape} and type {values.dtype} cannot be added: give a flat "
            "sequence of token ids"
        )
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"token id {low if low < 0 else high} is not in the vocabulary: ids are 0 to "
            f"{vocab_size - 1}"
        )
    return values.astype(np.int32)
