"""The death of a launcher, with the launchers themselves: their ranks checkpoint and are gone."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager

import psutil
import pytest

from mc_ds.training.checkpoint import list_checkpoints
from tests.support.fault_ranks import records, tiny
from tests.support.processes import ROOT, launcher
from tests.support.tiny_run import TIMEOUT_S, environment

TWO_RANKS = {
    "deepspeed": ["--num_gpus", "2"],
    "torchrun": ["--standalone", "--nproc_per_node", "2"],
}
SCRIPT = ROOT / "launch/train.py"


@contextmanager
def launched(name, folder):
    """An endless run under a launcher, of which three steps are done."""
    config = tiny(
        folder,
        "launched",
        train=dict(total_steps=100_000),
        checkpoint=dict(interval=0),
        data=dict(num_workers=1),
    )
    (folder / "recipe.yaml").write_text(json.dumps(config))
    command = [*launcher(name), *TWO_RANKS[name], SCRIPT, "--config", folder / "recipe.yaml"]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(folder),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(records(folder, "launched")) > 2, folder / "output.txt")
        yield process
    finally:
        kill_session(process.pid)


def saved_step(folder):
    """The step of the one checkpoint."""
    (checkpoint,) = list_checkpoints(folder / "runs/launched/checkpoints")
    return int(checkpoint.name.removeprefix("step_"))


@pytest.mark.parametrize(
    "name", [pytest.param("deepspeed"), pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_ranks_of_a_killed_launcher_save_and_leave(tmp_path, name):
    with launched(name, tmp_path) as process:
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert (
            len([rank for rank in ranks if "launch/train.py" in " ".join(rank.cmdline())]) >= 4
        )  # and their loaders
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
        assert not alive, (tmp_path / "output.txt").read_text()[-2000:]
    said = (tmp_path / "output.txt").read_text()
    assert f"stopped by death of the launcher after step {saved_step(tmp_path)}" in said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("deepspeed", 85), ("torchrun", 1)])
def test_ranks_that_are_signalled_themselves_end_the_launcher(tmp_path, name, code):
    """As `pkill -USR1 -f -- '-u launch/train.py'` does, which matches ranks and no launcher.

    The launchers' limit of 30 s begins with a signal to them, and their exit code is then theirs.
    """
    with launched(name, tmp_path) as process:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        ranks = [each for each in tree if f"-u {SCRIPT}" in " ".join(each.cmdline())]
        assert 2 <= len(ranks) < len(tree)
        assert process.pid not in [rank.pid for rank in ranks]
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        assert process.wait(TIMEOUT_S) == code, (tmp_path / "output.txt").read_text()[-2000:]
    said = (tmp_path / "output.txt").read_text()
    assert f"stopped by SIGUSR1 after step {saved_step(tmp_path)}" in said
    assert name == "deepspeed" or "85" in said.partition("ChildFailedError")[2]


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
