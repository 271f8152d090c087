"""The rank environment: who am I, how do the ranks meet, and which device is mine.

Understands the deepspeed launcher, torchrun, Slurm (srun) and a single process. Source: docs/design.md; DeepSpeed's `init_distributed`.
"""

import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import deepspeed
import torch
import torch.distributed as dist

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    """Coordinates of this process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def read_rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Rank, local rank and world size from what the launcher set. Raises ConfigError naming what is missing."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        _require(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", who="the launcher")
        world_size = int(environ["WORLD_SIZE"])
        if world_size > 1:
            _require(environ, "MASTER_ADDR", "MASTER_PORT", who="the launcher")
        local_world = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world_size)))
        return RankEnvironment(int(environ["RANK"]), int(environ["LOCAL_RANK"]), world_size, local_world, "launcher")
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        _require(environ, "SLURM_LOCALID", who="srun")
        _require(environ, "MASTER_ADDR", "MASTER_PORT", who="under srun, the batch script")
        world_size = int(environ["SLURM_NTASKS"])
        local_world = int(environ.get("SLURM_NTASKS_PER_NODE", str(world_size)).split("(")[0])
        return RankEnvironment(int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), world_size, local_world, "slurm")
    return RankEnvironment(0, 0, 1, 1, "single")


def device_type() -> Literal["cuda", "cpu"]:
    """What this machine trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_distributed(env: RankEnvironment, *, timeout_s: float = 1800.0) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this rank's device."""
    # DeepSpeed calls collectives by names that newer versions of torch deprecate, once per call.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated", category=FutureWarning)
    on_gpu = device_type() == "cuda"
    device = torch.device("cuda", env.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        # DeepSpeed would otherwise compile a shared-memory extension for tens of seconds at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // env.local_world_size))
    os.environ.update(RANK=str(env.rank), LOCAL_RANK=str(env.local_rank), WORLD_SIZE=str(env.world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if env.launcher == "single" or "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            rank=env.rank,
            world_size=env.world_size,
        )
    return device


def _require(environ: Mapping[str, str], *names: str, who: str) -> None:
    """Raises ConfigError naming the variables that `who` should have set."""
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigError(f"{who} set only part of the rank environment: {', '.join(missing)} missing (needed: {', '.join(names)})")


def _free_port() -> int:
    """A TCP port that is free at this moment, for a process group of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
