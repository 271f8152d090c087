"""The death of a launcher, with the launchers themselves: their ranks checkpoint and are gone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mc_ds.training.checkpoint import list_checkpoints
from tests.support.fault_ranks import records, tiny
from tests.support.tiny_run import ROOT, TIMEOUT_S, environment

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_gpus", "2"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize(
    "launcher", [pytest.param("deepspeed"), pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_ranks_of_a_killed_launcher_save_and_leave(tmp_path, launcher):
    config = tiny(
        tmp_path,
        "orphans",
        train=dict(total_steps=100_000),
        checkpoint=dict(interval=0),
        data=dict(num_workers=1),
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))
    command = [*LAUNCHERS[launcher], ROOT / "launch/train.py", "--config", tmp_path / "recipe.yaml"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(records(tmp_path, "orphans")) > 2, tmp_path / "output.txt")
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert (
            len([rank for rank in ranks if "launch/train.py" in " ".join(rank.cmdline())]) >= 4
        )  # and their loaders
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
        assert not alive, (tmp_path / "output.txt").read_text()[-2000:]
    finally:
        kill_session(process.pid)
    (checkpoint,) = list_checkpoints(tmp_path / "runs/orphans/checkpoints")
    assert (
        f"stopped by death of the launcher after step {int(checkpoint.name.removeprefix('step_'))}"
        in (tmp_path / "output.txt").read_text()
    )


def wait_for(condition, output):
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline, output.read_text()[-2000:]
        time.sleep(0.1)


def kill_session(session):
    """Whatever is left of the processes that were started here."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.send_signal(signal.SIGKILL)
        except (OSError, psutil.Error):
            continue
