"""Devices and dtypes by name, as users give them."""

import torch

from mc_ds.config import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that a model may compute with."""


def device_of(name: str | torch.device) -> torch.device:
    """Return the device of this name. Raises ConfigError where there is none."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device = {name!r}: no such device: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name}: no device to compute on: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {name}: {torch.cuda.device_count()} GPUs are visible: use cpu, or one of "
            "them"
        )
    return device


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConfigError for what is not a dtype of weights; None, their own, is one."""
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise ConfigError(f"dtype = {dtype!r} is none that a model computes with: use {names}")
