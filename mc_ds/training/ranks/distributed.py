"""Reads this process's rank from the environment, and joins the process group.

| started by | rank, local rank, world size, local world size | rendezvous address |
|---|---|---|
| `deepspeed` | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE | MASTER_ADDR, MASTER_PORT |
| `torchrun` | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| `srun` | SLURM_PROCID, _LOCALID, _STEP_NUM_TASKS, _STEP_TASKS_PER_NODE | the same |
| nothing | 0, 0, 1, 1 | none |

With srun, the batch script must set MASTER_ADDR and MASTER_PORT, where rank 0 listens. RANK takes
precedence over Slurm's variables, so that `srun torchrun` and `deepspeed` work inside a job.

All other connections use the network interface of NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME
(CPUs). If unset, NCCL uses the first interface that is up, and gloo the one with the address of the
host's name; if /etc/hosts maps that name to 127.0.1.1, other hosts cannot connect. See DeepSpeed's
`init_distributed`, and srun(1), "output environment variables".
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
from deepspeed.accelerator import get_accelerator

from mc_ds.config import ConfigError
from mc_ds.console import has_native_threads


@dataclass(frozen=True)
class RankEnvironment:
    """Rank and world size of this process. Raises ConfigError if the values are inconsistent."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: Literal["launcher", "slurm", "single"]
    """What started this process. "launcher" means deepspeed, torchrun, or any other launcher that
    sets the same variables.
    """

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ConfigError(
                f"the {self.launcher} environment is inconsistent: rank {self.rank} of"
                f" {self.world_size}, local rank {self.local_rank} of {self.local_world_size}:"
                " unset variables left by an earlier launcher, or correct the launcher"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def read_rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Read ranks and world sizes from the launcher's variables.

    Raises ConfigError if some are missing or inconsistent.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    if "SLURM_STEP_NUM_TASKS" in environ:
        return _from_srun(environ)
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and tasks != "1":
        raise ConfigError(
            f"this Slurm job has {tasks} tasks, but this process was not started by srun: start it"
            " with srun"
        )
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "mpirun does not set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: use"
            " deepspeed, torchrun or srun"
        )
    return RankEnvironment(0, 0, 1, 1, "single")


def device_type() -> Literal["cuda", "cpu"]:
    """Return "cuda" if this machine has a usable GPU and DeepSpeed uses it (the variable
    DS_ACCELERATOR can keep it from that), else "cpu".
    """
    on_gpu = torch.cuda.is_available() and get_accelerator().device_name() == "cuda"
    return "cuda" if on_gpu else "cpu"


def start_distributed(env: RankEnvironment, *, timeout_s: float = 1800.0) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    `timeout_s` is how long ranks wait for each other, here and in every collective. Raises
    ConfigError if there is no GPU for this rank, or if the ranks cannot connect.
    """
    # DeepSpeed uses deprecated names of collectives, which warn at every call.
    warnings.filterwarnings(
        "ignore", message=".*`torch.distributed.* is deprecated", category=FutureWarning
    )
    has_native_threads()
    on_gpu = device_type() == "cuda"
    device = (
        torch.device("cuda", gpu_index(env, torch.cuda.device_count()))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        # Keep DeepSpeed from compiling a shared-memory extension, which takes tens of seconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // env.local_world_size))
    # DeepSpeed's engine uses LOCAL_RANK as the index of its GPU.
    local_rank = env.local_rank if device.index is None else device.index
    os.environ.update(
        RANK=str(env.rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(env.world_size)
    )
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
    if env.world_size == 1 and not dist.is_initialized():
        # A single process needs no port, so it cannot collide with another run on this host.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # DeepSpeed reads it
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
                f"rank {env.rank} of {env.world_size} on {socket.gethostname()} could not connect"
                f" to the others at MASTER_ADDR:MASTER_PORT = {where} ({_first_line(error)}): check"
                " that this is rank 0's address, that it is reachable from here, that the port is"
                " free, and that all ranks started"
            ) from error
    return device


def gpu_index(env: RankEnvironment, visible: int) -> int:
    """Return the index of a rank's GPU: its local rank, or 0 if Slurm shows each task only one GPU.

    `visible` is the number of visible GPUs. Raises ConfigError if there are too few.
    """
    if visible == 1 and env.launcher == "slurm":
        return 0
    if env.local_rank >= visible:
        raise ConfigError(
            f"rank {env.rank} has local rank {env.local_rank}, but this host has only {visible}"
            " visible GPUs: start one process per GPU"
        )
    return env.local_rank


def _from_launcher(environ: Mapping[str, str]) -> RankEnvironment:
    """Read the variables set by deepspeed, torchrun and similar launchers."""
    local = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), "WORLD_SIZE"
    )
    rank, local_rank, world_size, local_world_size = _integers(
        environ, "RANK", "LOCAL_RANK", "WORLD_SIZE", local, who="the launcher"
    )
    if world_size > 1:
        _check_rendezvous(environ, who="the launcher")
    return RankEnvironment(rank, local_rank, world_size, local_world_size, "launcher")


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    """Read the variables set by srun."""
    rank, local_rank, world_size = _integers(
        environ, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", who="srun"
    )
    if world_size == 1:
        return RankEnvironment(0, 0, 1, 1, "slurm")
    (node,) = _integers(environ, "SLURM_NODEID", who="srun")
    _check_rendezvous(environ, who="the batch script (as launch/slurm/train.sbatch does)")
    return RankEnvironment(
        rank,
        local_rank,
        world_size,
        tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[node],
        "slurm",
    )


def tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's number of tasks per node: "4(x2),3" becomes [4, 4, 3].

    Raises ConfigError for anything else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {text!r}: should have the form 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _integers(environ: Mapping[str, str], *names: str, who: str) -> list[int]:
    """Return variables as integers. Raises ConfigError, which tells `who` to set them, if any is
    missing or invalid.
    """
    _require(environ, *names, who=who)
    wrong = [f"{name} = {environ[name]!r}" for name in names if not environ[name].isdecimal()]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: {who} should set whole numbers")
    return [int(environ[name]) for name in names]


def _check_rendezvous(environ: Mapping[str, str], *, who: str) -> None:
    """Raise ConfigError if MASTER_ADDR or MASTER_PORT is missing or invalid."""
    _require(environ, "MASTER_ADDR", "MASTER_PORT", who=who)
    port = environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"MASTER_PORT = {port!r}: should be a port from 1 to 65535, the same on every rank"
        )


def _require(environ: Mapping[str, str], *names: str, who: str) -> None:
    """Raise ConfigError if one of the variables, which `who` should set, is missing or empty."""
    needed = list(dict.fromkeys(names))
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"the rank environment is incomplete: {', '.join(missing)} missing; {who} should set"
            f" {', '.join(needed)}"
        )


def _first_line(error: Exception) -> str:
    """Return a torch error's message without its C++ traceback."""
    return str(error).strip().partition("\n")[0]
