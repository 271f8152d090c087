"""Who am I among the ranks: the variables of each launcher, and what is said when some are
missing.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mc_ds.config import ConfigError
from mc_ds.training.ranks.distributed import (
    RankEnvironment,
    device_type,
    gpu_index,
    read_rank_environment,
    tasks_per_node,
)
from tests.support.tiny_run import TIMEOUT_S

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    **MEETING,
}
DEEPSPEED = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    **MEETING,
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
    **MEETING,
}


@pytest.mark.parametrize(
    ("environ", "launcher"), [(TORCHRUN, "launcher"), (DEEPSPEED, "launcher"), (SRUN, "slurm")]
)
def test_every_launcher_gives_the_same_coordinates(environ, launcher):
    environment = read_rank_environment(environ)
    assert environment == RankEnvironment(
        rank=5, local_rank=1, world_size=8, local_world_size=4, launcher=launcher
    )
    assert not environment.is_main
    rank = "SLURM_PROCID" if launcher == "slurm" else "RANK"
    assert read_rank_environment({**environ, rank: "0"}).is_main


def test_torchrun_inside_srun_is_torchrun():
    assert read_rank_environment({**SRUN, **TORCHRUN, "RANK": "3"}).rank == 3


def test_slurm_writes_tasks_of_nodes_in_its_own_way():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert read_rank_environment({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "6,2"}).local_world_size == 2
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE = '4x2'"):
        tasks_per_node("4x2")


def test_one_task_of_srun_is_alone():
    alone = {
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
    }
    assert read_rank_environment(alone) == RankEnvironment(0, 0, 1, 1, "slurm")


def test_a_batch_script_without_srun_does_not_train_on_one_gpu_of_many():
    with pytest.raises(ConfigError, match=r"8 tasks.*start it with srun"):
        read_rank_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **MEETING})


def test_mpirun_does_not_start_runs_that_know_nothing_of_each_other():
    with pytest.raises(
        ConfigError, match=r"mpirun does not set RANK.*use deepspeed, torchrun or srun"
    ):
        read_rank_environment({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "8"}, {"LOCAL_RANK": "0"}],
)
def test_a_process_without_launcher_is_alone(environ):
    assert read_rank_environment(environ) == RankEnvironment(0, 0, 1, 1, "single")


def test_one_rank_needs_no_meeting_place():
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert read_rank_environment(alone) == RankEnvironment(0, 0, 1, 1, "launcher")


@pytest.mark.parametrize(
    ("environ", "gone"),
    [
        *(
            (TORCHRUN, name)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        ),
        *(
            (SRUN, name)
            for name in (
                "SLURM_PROCID",
                "SLURM_LOCALID",
                "SLURM_NODEID",
                "MASTER_ADDR",
                "MASTER_PORT",
            )
        ),
    ],
)
def test_what_is_missing_is_named(environ, gone):
    with pytest.raises(ConfigError) as caught:
        read_rank_environment({name: value for name, value in environ.items() if name != gone})
    assert f": {gone} missing" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT = '0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http'"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        read_rank_environment({**TORCHRUN, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "accelerator", "device"),
    [(True, "cuda", "cuda"), (True, "cpu", "cpu"), (False, "cuda", "cpu"), (False, "cpu", "cpu")],
)
def test_the_device_is_that_of_deepspeed(monkeypatch, visible, accelerator, device):
    """Its launcher makes GPUs visible, also where DS_ACCELERATOR = cpu."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible)
    chosen = SimpleNamespace(device_name=lambda: accelerator)
    monkeypatch.setattr("mc_ds.training.ranks.distributed.get_accelerator", lambda: chosen)
    assert device_type() == device


def test_the_gpu_of_a_rank():
    third = RankEnvironment(3, 3, 4, 4, "slurm")
    assert gpu_index(third, visible=4) == 3
    assert gpu_index(third, visible=1) == 0  # srun --gpus-per-task hides the others
    for environment, visible in ((third, 2), (RankEnvironment(1, 1, 2, 2, "launcher"), 1)):
        with pytest.raises(
            ConfigError, match=f"has only {visible} visible GPUs: start one process per GPU"
        ):
            gpu_index(environment, visible)


@pytest.mark.parametrize(("rank", "why"), [("1", "timed out"), ("0", "in use")])
def test_ranks_that_do_not_meet_say_where_and_why(rank, why):
    """Rank 1 finds nobody at the meeting point; rank 0 finds its port taken."""
    program = """
import sys
from mc_ds.config import ConfigError
from mc_ds.training.ranks.distributed import read_rank_environment, start_distributed
try:
    start_distributed(read_rank_environment(), timeout_s=1)
except ConfigError as error:
    sys.exit(f"error: {error}")
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == "0":
            taken.listen()
        port = str(taken.getsockname()[1])
        environ = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environ | cpu,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"error: rank {rank} of 2 on {socket.gethostname()} could not connect to the others at"
        f" MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}"
    ), done.stderr
    assert why in last


ALONE = """
import os, torch, torch.distributed as dist
from mc_ds.training.ranks.distributed import read_rank_environment, start_distributed
start_distributed(read_rank_environment(), timeout_s=20)
total = torch.ones(2)
dist.all_reduce(total)
assert total.tolist() == [1.0, 1.0]
dist.destroy_process_group()
os._exit(0)  # as the program does: gloo's threads may abort a process whose interpreter is finalized
"""


def test_a_process_of_one_needs_no_meeting_point() -> None:
    """Runs beside it could take a port between its being chosen and used, or have taken the
    launcher's.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        launched = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        for given in ({}, launched):
            done = subprocess.run(
                [sys.executable, "-c", ALONE],
                env=os.environ | cpu | given,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert done.returncode == 0, done.stderr
