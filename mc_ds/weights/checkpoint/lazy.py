"""Read tensors from files of `torch.save` piece by piece. Opening a file allocates no memory for
values and executes no code.

A file is unpickled with `weights_only` onto the meta device, where each storage has its offset in
the file. Values are then read from that offset into the destination tensor. (Memory-mapping would
count every page touched as resident memory.)
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.storage import reason
from mc_ds.weights.checkpoint.folder import CheckpointRemovedError


class _Stage(int):
    """Replaces `ZeroStageEnum`, an integer."""


class _LossScaler:
    """Replaces `LossScaler`; its content is not used."""


class _FragmentAddress:
    """Replaces `fragment_address`: `numel` elements from element `start`."""


ALLOWED = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _LossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": _FragmentAddress,
}
"""The classes in DeepSpeed's optimizer files (the last one in stages 1 and 2 only), each with its
replacement here, which holds data and has no code.
"""


@dataclass(frozen=True)
class Piece:
    """`count` elements of `dtype` in a file, from byte `offset`."""

    path: Path
    offset: int
    count: int
    dtype: torch.dtype

    def part(self, start: int, count: int) -> "Piece":
        """Return the piece of `count` of its elements, starting at element `start`."""
        assert 0 <= start <= start + count <= self.count, (
            f"{start} + {count} elements of {self.count}"
        )
        return Piece(self.path, self.offset + start * self.dtype.itemsize, count, self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose values are in one or several files: the concatenation of its pieces, the last
    of which may have padding.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return self.pieces[0].dtype

    def read(self) -> Tensor:
        """Read the values into a new tensor. Raises ConfigError for a file that is truncated or
        cannot be read.
        """
        flat = torch.empty(prod(self.shape), dtype=self.dtype)
        filled = 0
        for piece in self.pieces:
            count = min(piece.count, flat.numel() - filled)
            _read_into(flat[filled : filled + count], piece.path, piece.offset)
            filled += count
        assert filled == flat.numel(), f"pieces of {filled} elements for {self.shape}"
        return flat.view(self.shape)


def load_lazy(path: Path) -> Any:
    """Return the content of a `torch.save` file with tensors on the meta device. `stored` and
    `piece_of` locate their values.

    Raises ConfigError, in one line, for a file that is missing or damaged, or holds classes other
    than those of `ALLOWED`.
    """
    try:
        with torch.serialization.safe_globals(
            [(stand_in, name) for name, stand_in in ALLOWED.items()]
        ):
            return torch.load(path, map_location="meta", weights_only=True)
    except FileNotFoundError as error:
        if not path.parent.exists():
            raise _unreadable(path, error) from None
        raise ConfigError(f"{path} is missing: restore it, or use another checkpoint") from None
    except pickle.UnpicklingError as error:
        if refused := _refused(path):
            raise ConfigError(
                f"{path} holds {', '.join(refused)}, which no checkpoint of this trainer holds: it"
                " is not loaded, use another checkpoint"
            ) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # unpickling a damaged file can raise anything
        raise _unreadable(path, error) from None


def piece_of(path: Path, tensor: Any) -> Piece:
    """Return the location in the file of a tensor from `load_lazy(path)`."""
    if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
        raise ConfigError(
            f"{path} holds {type(tensor).__name__} where a contiguous tensor should be: it was not"
            " written by this trainer"
        )
    start: int | None = tensor.untyped_storage()._checkpoint_offset if tensor.numel() else 0
    assert start is not None, "torch.load does not say where storages lie"
    return Piece(
        path,
        start + int(tensor.storage_offset()) * tensor.element_size(),
        tensor.numel(),
        tensor.dtype,
    )


def stored(path: Path, tensor: Any) -> StoredTensor:
    """Return a tensor from `load_lazy(path)` as a StoredTensor of one piece."""
    piece = piece_of(path, tensor)
    return StoredTensor(tuple(tensor.shape), (piece,))


def stored_in(path: Path, names: Sequence[str], tensors: Any) -> dict[str, StoredTensor]:
    """Return the tensors `names` of a dictionary from `load_lazy(path)`, by name."""
    return {name: stored(path, tensors[name]) for name in names}


def _read_into(flat: Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous tensor with the bytes of a file from `offset` on."""
    target = flat.view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise ConfigError(
                        f"{path} ends after {offset + done} bytes, in the middle of a tensor:"
                        " restore it"
                    )
                done += count
    except OSError as error:
        raise _unreadable(path, error) from None


def _refused(path: Path) -> list[str]:
    """Return the names of the classes and functions in a file that are not allowed, without
    importing them.
    """
    try:
        with torch.serialization.safe_globals(
            [(stand_in, name) for name, stand_in in ALLOWED.items()]
        ):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _unreadable(path: Path, error: BaseException) -> ConfigError:
    if not path.parent.exists():
        return CheckpointRemovedError(path.parent)
    return ConfigError(
        f"{path} cannot be read ({reason(error)}): restore it, or use another checkpoint"
    )
