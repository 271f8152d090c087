"""One rank of a round trip: `python tools/doctor.py --probe`, started by any launcher.

The ranks connect, compare versions and devices, and time a small and a large all-reduce. Rank 0
prints one line: PROBE_PREFIX and JSON.
"""

import json
import platform
import socket
import sys
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from machine.findings import PROBE_PREFIX
from mc_ds.config import ConfigError
from mc_ds.training.ranks.distributed import (
    RankEnvironment,
    read_rank_environment,
    start_distributed,
)

CONNECT_TIMEOUT_S = 40.0
LARGE_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
REPEATS = 5


def round_trip(env: RankEnvironment) -> dict[str, Any]:
    """Run a round trip and return its report, which is equal on all ranks. A collective.

    Keys: `hosts` (name by rank), `facts` (versions by rank), `backend`, `correct`, `latency_ms` (an
    all-reduce of 4 bytes), and `gb_per_s` of the large one (bytes sent per rank, over time). Raises
    ConfigError if the ranks cannot connect. Leaves the process group open.
    """
    device = start_distributed(env, timeout_s=CONNECT_TIMEOUT_S)
    # This sum is correct only if every rank took part exactly once.
    total = torch.full((1,), float(env.rank + 1), device=device)
    dist.all_reduce(total)
    large = torch.ones(LARGE_BYTES[device.type] // 4, device=device)
    latency, duration = _seconds(torch.ones(1, device=device)), _seconds(large)
    everyone: list[Any] = [None] * env.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), _facts(device)))
    sent = 2 * (env.world_size - 1) / env.world_size * LARGE_BYTES[device.type]
    return {
        "hosts": [host for host, _ in everyone],
        "facts": [facts for _, facts in everyone],
        "backend": dist.get_backend(),
        "correct": float(total) == env.world_size * (env.world_size + 1) / 2,
        "latency_ms": 1e3 * latency,
        "gb_per_s": sent / duration / 1e9,
    }


def _facts(device: torch.device) -> dict[str, str]:
    """Return the facts that must be equal on all ranks."""
    facts = {"python": platform.python_version()}
    facts |= {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _seconds(tensor: torch.Tensor) -> float:
    """Return the minimum time of REPEATS all-reduces, after one that opens connections."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        tensor.fill_(1.0)
    return min(times[1:])


def main() -> int:
    """Print the report and return the exit code: 0, or 2 if the ranks cannot connect."""
    try:
        env = read_rank_environment()
        report = round_trip(env)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if env.is_main:
        print(PROBE_PREFIX + json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0
