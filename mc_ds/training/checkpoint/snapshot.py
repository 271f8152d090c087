"""Copies a state to host memory, so that it can be written while training changes the original."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch


def host_copy(state: Any) -> Any:
    """Return a deep copy of `state` with all of its tensors in host memory.

    `torch.save` writes the copy like the state, apart from the device: a storage that several
    tensors share is copied once, and every view keeps its offset and strides. Tensors on a GPU are
    copied to pinned memory, which PyTorch caches for the next copy.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copied = {id(tensor): _copied(tensor, storages) for tensor in _tensors(state)}
    if any(tensor.is_cuda for tensor in _tensors(state)):
        torch.cuda.current_stream().synchronize()
    return copy.deepcopy(state, copied)


class HostBytes(NamedTuple):
    """Bytes of host memory that a copy takes."""

    pageable: int
    """Freed with the copy."""
    pinned: int
    """Kept by PyTorch for the next copy. Allocated in powers of two."""


def host_bytes(state: Any) -> HostBytes:
    """Return the bytes of host memory that `host_copy` allocates for tensors."""
    storages = {
        tensor.untyped_storage()._cdata: (tensor.untyped_storage().nbytes(), tensor.is_cuda)
        for tensor in _tensors(state)
    }
    return HostBytes(
        pageable=sum(size for size, pinned in storages.values() if not pinned),
        pinned=sum(1 << (size - 1).bit_length() for size, pinned in storages.values() if pinned),
    )


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _copied(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """Return the tensor as a view of a host copy of its storage.

    `storages` maps the identity of each original storage to the copy made so far.
    """
    original = tensor.untyped_storage()
    if original._cdata not in storages:
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(original)
        host = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        storages[original._cdata] = host.copy_(raw, non_blocking=True).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype).set_(
        storages[original._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(view, requires_grad=tensor.requires_grad)
    return view.requires_grad_(tensor.requires_grad)
