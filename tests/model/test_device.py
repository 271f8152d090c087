"""Devices and dtypes that users give: what is accepted, and what a refusal says."""

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.model.device import DTYPES, check_dtype, device_of


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_name_is_the_device_that_it_names(name: str) -> None:
    assert device_of(name) == device_of(torch.device(name)) == torch.device(name)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device = 'gpu': not a device: use cpu or cuda"),
        (None, "device = None: not a device: use cpu or cuda"),
        ("meta", "device = meta: not supported: use cpu or cuda"),
        ("cuda:2", "device = cuda:2: only 2 GPUs are visible: use one of them, or cpu"),
    ],
)
def test_any_other_name_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        device_of(name)
    assert str(error.value) == message


def test_the_only_gpu_needs_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("cuda") == torch.device("cuda")


def test_a_gpu_is_refused_where_none_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="only 0 GPUs are visible"):
            device_of(name)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_dtypes_of_weights_are_accepted(dtype: torch.dtype | None) -> None:
    check_dtype(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, "bf16"])
def test_other_dtypes_are_refused_with_those_that_are_not(dtype: torch.dtype) -> None:
    names = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
    with pytest.raises(ConfigError) as error:
        check_dtype(dtype)
    assert str(error.value) == f"dtype = {dtype!r} is not supported: use {names}"
