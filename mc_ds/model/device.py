"""Parse and check the devices and dtypes that users give."""

import torch

from mc_ds.config import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Weight dtypes that a model supports."""


def device_of(name: str | torch.device) -> torch.device:
    """Return the device with this name. Raises ConfigError if it does not exist."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device = {name!r}: not a device: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name}: not supported: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {name}: only {torch.cuda.device_count()} GPUs are visible: use one of "
            "them, or cpu"
        )
    return device


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConfigError for an unsupported weight dtype. None is valid and stands for the weights'
    own.
    """
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise ConfigError(f"dtype = {dtype!r} is not supported: use {names}")
