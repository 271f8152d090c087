"""The rank environment: this process's rank, where the ranks meet, and its device.

| started by | rank, local rank, world size, local world size | meeting point |
|---|---|---|
| `deepspeed` | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE | MASTER_ADDR, MASTER_PORT |
| `torchrun` | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| `srun` | SLURM_PROCID, _LOCALID, _STEP_NUM_TASKS, _STEP_TASKS_PER_NODE | the same |
| nothing | 0, 0, 1, 1 | nobody to meet |

Under srun the batch script sets the meeting point. RANK takes precedence over Slurm's variables, so
that `srun torchrun` and `deepspeed` work inside a job. At the meeting point rank 0 listens; all
other connections go through the network interface that NCCL_SOCKET_IFNAME (GPUs) or
GLOO_SOCKET_IFNAME (CPUs) names. Without them NCCL uses the first interface that is up, and gloo the
one with the address of the host's own name; if /etc/hosts maps that name to 127.0.1.1, other hosts
cannot reach it. Source: docs/model.md; DeepSpeed's `init_distributed`; srun(1), "output environment
variables".
"""

import os
import re
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
    """Rank and world size of this process. Raises ConfigError where the values contradict each
    other.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: Literal["launcher", "slurm", "single"]
    """What started this process. "launcher" is deepspeed, torchrun or another one that sets their
    variables.
    """

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ConfigError(
                f"the {self.launcher} environment contradicts itself: rank {self.rank} of"
                f" {self.world_size}, local rank {self.local_rank} of {self.local_world_size}:"
                " unset what an earlier launcher left behind, or correct the launcher"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def read_rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Read rank, local rank and world size from the launcher's variables. Raises ConfigError,
    naming those that are missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    if "SLURM_STEP_NUM_TASKS" in environ:
        return _from_srun(environ)
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and tasks != "1":
        raise ConfigError(
            f"this job has {tasks} tasks, and this process was started outside srun, as none of"
            " them: start it with srun"
        )
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "mpirun sets no RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: use"
            " deepspeed, torchrun or srun"
        )
    return RankEnvironment(0, 0, 1, 1, "single")


def device_type() -> Literal["cuda", "cpu"]:
    """Return the type of device that this machine trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_distributed(env: RankEnvironment, *, timeout_s: float = 1800.0) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    `timeout_s` is the time that ranks wait for each other, here and in every collective. Raises
    ConfigError where this rank has no GPU or where the ranks do not meet.
    """
    # DeepSpeed calls collectives by names that newer torch deprecates, with a warning for each
    # call.
    warnings.filterwarnings(
        "ignore", message=".*`torch.distributed.* is deprecated", category=FutureWarning
    )
    on_gpu = device_type() == "cuda"
    device = (
        torch.device("cuda", gpu_index(env, torch.cuda.device_count()))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        # DeepSpeed would otherwise compile a shared-memory extension for tens of seconds at the
        # first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // env.local_world_size))
    # DeepSpeed's engine takes LOCAL_RANK for the index of its GPU.
    local_rank = env.local_rank if device.index is None else device.index
    os.environ.update(
        RANK=str(env.rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(env.world_size)
    )
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
    if env.world_size == 1 and not dist.is_initialized():
        # A single process needs no port, which another run on this host might already use.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # DeepSpeed asks for it
        os.environ.setdefault("MASTER_PORT", "0")
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if not deepspeed.comm.is_initialized():
        try:
            deepspeed.init_distributed(
                dist_backend=backend,
                auto_mpi_discovery=False,
                timeout=timeout,
                rank=env.rank,
                world_size=env.world_size,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"rank {env.rank} of {env.world_size} on {socket.gethostname()} did not meet the"
                f" others at {where}, where rank 0 listens ({_first_line(error)}): that address"
                " must be rank 0's, reachable from here, its port free, and all ranks must start"
            ) from error
    return device


def gpu_index(env: RankEnvironment, visible: int) -> int:
    """Return the index of a rank's GPU among the `visible` ones: its local rank, or 0 where the
    launcher shows it only one.
    """
    if visible == 1 and env.launcher == "slurm":
        return 0
    if env.local_rank >= visible:
        raise ConfigError(
            f"rank {env.rank} is process {env.local_rank} of this host, which has {visible} GPUs:"
            " start one process per GPU"
        )
    return env.local_rank


def _from_launcher(environ: Mapping[str, str]) -> RankEnvironment:
    """Read the variables that deepspeed, torchrun and similar launchers set."""
    local = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), "WORLD_SIZE"
    )
    rank, local_rank, world_size, local_world_size = _integers(
        environ, "RANK", "LOCAL_RANK", "WORLD_SIZE", local, who="the launcher"
    )
    if world_size > 1:
        _meeting_point(environ, who="the launcher")
    return RankEnvironment(rank, local_rank, world_size, local_world_size, "launcher")


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    """Read the variables that srun sets for each task of its step."""
    rank, local_rank, world_size = _integers(
        environ, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", who="srun"
    )
    if world_size == 1:
        return RankEnvironment(0, 0, 1, 1, "slurm")
    (node,) = _integers(environ, "SLURM_NODEID", who="srun")
    _meeting_point(environ, who="under srun, the batch script (launch/slurm/train.sbatch does)")
    return RankEnvironment(
        rank,
        local_rank,
        world_size,
        tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[node],
        "slurm",
    )


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form: "4(x2),3" is [4, 4, 3]. Raises
    ConfigError for anything else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {text!r}: should be like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _integers(environ: Mapping[str, str], *names: str, who: str) -> list[int]:
    """Return the variables that `who` should have set, as integers. Raises ConfigError, naming
    those that are missing or not numbers.
    """
    _require(environ, *names, who=who)
    wrong = [f"{name} = {environ[name]!r}" for name in names if not environ[name].isdecimal()]
    if wrong:
        raise ConfigError(f"{who} should set whole numbers, got {', '.join(wrong)}")
    return [int(environ[name]) for name in names]


def _meeting_point(environ: Mapping[str, str], *, who: str) -> None:
    """Raise ConfigError where the address or port of rank 0 is missing or invalid."""
    _require(environ, "MASTER_ADDR", "MASTER_PORT", who=who)
    port = environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"MASTER_PORT = {port!r}: should be a port from 1 to 65535, the same on every rank"
        )


def _require(environ: Mapping[str, str], *names: str, who: str) -> None:
    """Raise ConfigError, naming the variables that `who` should have set, where some are
    missing.
    """
    needed = list(dict.fromkeys(names))
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"the rank environment is incomplete: {', '.join(missing)} missing; {who} should set"
            f" {', '.join(needed)}"
        )


def _first_line(error: Exception) -> str:
    """Return the message of an error of torch without the native traceback below it."""
    return str(error).strip().partition("\n")[0]
