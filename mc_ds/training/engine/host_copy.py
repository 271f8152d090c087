"""Copies small results to the host while the device works on."""

from collections.abc import Callable

import torch
from torch import Tensor


def copy_to_host(value: Tensor) -> Callable[[], Tensor]:
    """Start to copy `value`, and return a function that waits for the copy and returns it.

    It waits for the work launched before this call, not for what is launched afterwards.
    """
    host = value.to("cpu", non_blocking=True)  # pinned memory, if `value` is on a GPU
    copied = torch.cuda.Event() if value.is_cuda else None
    if copied is not None:
        copied.record()

    def read() -> Tensor:
        if copied is not None:
            copied.synchronize()
        return host

    return read
