"""Checks of GPUs, their driver and libraries, as seen by torch."""

import shutil
import subprocess
from collections.abc import Iterator

from machine.findings import Finding, Status

GIB = 2**30
BUSY_SHARE = 0.1
"""Share of a GPU's memory; if more is in use, another process probably runs on it."""


def check_gpus() -> Iterator[Finding]:
    """Check models, free memory, bfloat16 support and peer access of the GPUs; report versions."""
    import torch

    driver = _driver_version()
    if not torch.cuda.is_available():
        if driver is not None:
            built = (
                f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
            )
            fix = (
                "install a build of torch for a CUDA version that the driver supports (make venv"
                " TORCH=...), or unset CUDA_VISIBLE_DEVICES"
            )
            yield Finding(
                Status.FAIL,
                "gpus",
                f"driver {driver} works, but torch {torch.__version__} ({built}) finds no GPU",
                fix,
            )
        else:
            yield Finding(
                Status.WARN,
                "gpus",
                "none: training would use CPUs",
                "expected on a login node; train on nodes with GPUs",
            )
        return
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(
        Status.OK,
        "gpus",
        f"{count} x {names[0]}; driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}",
    )
    if len(set(names)) > 1:
        yield Finding(
            Status.WARN,
            "gpus",
            f"different models ({', '.join(names)})",
            "the slowest one limits the speed: select equal ones with deepspeed --include",
        )
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if total - free > BUSY_SHARE * total:
            used = f"GPU {index} has {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB in use"
            yield Finding(
                Status.WARN,
                "gpus",
                used,
                "list its processes with nvidia-smi, and end those left by an earlier run",
            )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding(
            Status.WARN,
            "gpus",
            f"{names[0]} does not support bfloat16",
            "train with --train.precision=fp32",
        )
    if count > 1 and not all(
        torch.cuda.can_device_access_peer(0, other) for other in range(1, count)
    ):
        fix = "check NVLink and PCIe access control (nvidia-smi topo -m); give a container all GPUs"
        yield Finding(
            Status.WARN,
            "gpus",
            "GPU 0 cannot access the memory of the others: NCCL must copy through host memory",
            fix,
        )


def _driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None if there is no working one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
