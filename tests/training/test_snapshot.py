"""Copies of a state in host memory: independent of the original, and written as it would be."""

import io
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from mc_ds.training.checkpoint.snapshot import HostBytes, host_bytes, host_copy


class Address(NamedTuple):
    numel: int
    start: int


class Scaler:
    def __init__(self) -> None:
        self.scale = [1.0]


def state() -> dict[str, Any]:
    """Everything that DeepSpeed puts into its files, and tensors that share storages."""
    flat = torch.arange(12.0)
    return {
        "flat": [flat, flat[3:7]],
        "transposed": (flat.view(3, 4).t(),),
        "parameter": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "frozen": OrderedDict(a=nn.Parameter(torch.zeros(3), requires_grad=False)),
        "nothing": torch.empty(0),
        "number": torch.tensor(3),
        "address": {"weight": Address(4, 0)},
        "scaler": Scaler(),
        "step": 7,
    }


def written(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_copy_is_written_as_the_state_would_be() -> None:
    original = state()
    before = written(original)
    copied = host_copy(original)
    for tensor in (*original["flat"][:1], original["number"], original["frozen"]["a"].data):
        tensor.add_(1)
    original["scaler"].scale[0] = 2.0
    original["address"].clear()
    assert written(original) != before
    read = torch.load(io.BytesIO(written(copied)), weights_only=False)
    expected = torch.load(io.BytesIO(before), weights_only=False)
    assert read.keys() == expected.keys()
    for name in ("flat", "transposed"):
        for found, wanted in zip(read[name], expected[name], strict=True):
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()
    storages = {
        tensor.untyped_storage().data_ptr() for tensor in (*read["flat"], *read["transposed"])
    }
    assert len(storages) == 1, "a storage is copied once for all its views"
    assert isinstance(read["parameter"], nn.Parameter)
    assert read["parameter"].requires_grad
    assert not read["frozen"]["a"].requires_grad
    assert torch.equal(read["frozen"]["a"], torch.zeros(3))
    assert read["number"] == 3
    assert read["address"] == {"weight": Address(4, 0)}
    assert read["scaler"].scale == [1.0]


def test_memory_is_counted_once_per_storage() -> None:
    assert host_bytes(state()) == HostBytes(pageable=12 * 4 + 2 * 2 + 3 * 4 + 0 + 8, pinned=0)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_to_pinned_memory() -> None:
    weights = torch.arange(6.0, device="cuda")
    assert host_bytes([weights, weights[1:]]) == HostBytes(pageable=0, pinned=32)
    copied = host_copy({"all": weights, "last": weights[4:]})
    weights.add_(1)
    assert copied["all"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["last"].tolist() == [4, 5]
    assert copied["all"].is_pinned()
    assert copied["all"].device.type == "cpu"
