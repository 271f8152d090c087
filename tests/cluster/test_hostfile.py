"""`deepspeed --hostfile` over two hosts with pdsh and ssh, and one of them lost while the run
goes on.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import missing, search_path, wait_until
from tests.support.processes import ROOT, launcher
from tests.support.runs import Run, tail
from tests.support.ssh import PROGRAMS, start_hosts
from tests.support.tiny_run import TIMEOUT_S, environment, settings

needs_hosts = pytest.mark.skipif(bool(missing(*PROGRAMS)), reason=missing(*PROGRAMS))
WATCHDOG_S = 30
SCRIPT = "launch/train.py"


class Hosts:
    """Two hosts, a hostfile and a recipe for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hostfile, self.recipe, self.log = (
            folder / "hostfile",
            folder / "recipe.yaml",
            folder / "log",
        )
        self.hostfile.write_text("# two slots each\nhost-1 slots=2\nhost-2 slots=2\n")
        recipe = settings(
            folder,
            "lost",
            train=dict(total_steps=200),
            validation=dict(eval_interval=0),
            checkpoint=dict(interval=5),
            health=dict(watchdog_timeout_s=WATCHDOG_S),
        )
        self.recipe.write_text(json.dumps(recipe))  # JSON is YAML
        # What pdsh does not hand on by itself; PYTHONPATH it does.
        variables = environment(folder)
        exported = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
        lines = [f"{name}={variables[name]}" for name in exported] + [
            "GLOO_SOCKET_IFNAME=eth0",
            "OMP_NUM_THREADS=1",
        ]
        (folder / "deepspeed_env").write_text("\n".join(lines) + "\n")
        self.variables = variables | {
            "PATH": search_path(),
            "DS_ENV_FILE": str(folder / "deepspeed_env"),
        }
        self.first, self.second = start_hosts(folder)

    def launch(self, *options: str, settings: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """Starts the launcher on the first host, as a user would in the clone."""
        where = ["--hostfile", self.hostfile, "--master_addr", "host-1", *options]
        command = [*launcher("deepspeed"), *where, SCRIPT, "--config", self.recipe, *settings]
        return self.first.start(*command, directory=ROOT, variables=self.variables, output=self.log)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.first.kill()
    hosts.second.kill()


@needs_hosts
def test_the_doctor_visits_every_host(hosts):
    hosts.hostfile.write_text("host-1 slots=1\nhost-2 slots=1\n")
    folders = ["--run_dir", hosts.folder, "--cache_dir", hosts.folder]
    doctor = [
        "python",
        "tools/doctor.py",
        "--hostfile",
        hosts.hostfile,
        "--master_addr",
        "host-1",
        *folders,
    ]
    assert (
        hosts.first.start(
            *doctor, directory=ROOT, variables=hosts.variables, output=hosts.log
        ).wait(timeout=TIMEOUT_S)
        == 0
    ), tail(hosts.log)
    assert "ok    round trip     gloo, 2 ranks on 2 hosts" in hosts.log.read_text()
    hosts.second.run("ip", "link", "set", "eth0", "down")
    assert (
        hosts.first.start(
            *doctor, directory=ROOT, variables=hosts.variables, output=hosts.log
        ).wait(timeout=TIMEOUT_S)
        == 1
    )
    assert "fail  ssh            host-2: " in hosts.log.read_text()


@needs_hosts
def test_stopping_the_launcher_saves_on_all_hosts(hosts):
    run = Run(hosts.folder / "runs" / "lost")
    process = hosts.launch("--include", "host-1:0@host-2:0", settings=("--checkpoint.interval=0",))
    run.wait_for_step(3, hosts.log)
    for launching in hosts.first.scripts(launcher("deepspeed")[-1]):
        os.kill(launching, signal.SIGTERM)
    process.wait(timeout=TIMEOUT_S)
    wait_until(
        lambda: not (hosts.first.scripts(SCRIPT) or hosts.second.scripts(SCRIPT)),
        "all ranks to be gone",
    )
    assert run.checkpoints()[0] == len(run.record()), tail(hosts.log)


@needs_hosts
def test_a_run_over_two_hosts_outlives_the_loss_of_one(hosts):
    run = Run(hosts.folder / "runs" / "lost")
    process = hosts.launch("--include", "host-1:0@host-2:0")
    run.wait_for_step(7, hosts.log)
    assert [len(host.scripts(SCRIPT)) for host in (hosts.first, hosts.second)] == [1, 1]
    hosts.second.run("ip", "link", "set", "eth0", "down")
    try:
        code = process.wait(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the launcher still waits for the lost host\n{tail(hosts.log)}")
    assert code != 0
    assert "hangs: no progress" in hosts.log.read_text()
    wait_until(lambda: not hosts.first.scripts(SCRIPT), "no rank to be left on the first host")
    hosts.second.kill()
    saved, record = run.checkpoints()[0], run.record()
    assert 5 <= saved <= len(record)
    resumed = hosts.launch(
        "--include", "host-1:0,1", settings=(f"--train.total_steps={saved + 3}",)
    )
    assert resumed.wait(timeout=TIMEOUT_S) == 0, tail(hosts.log)
    assert run.checkpoints()[0] == len(run.record()) == saved + 3
    assert run.record()[:saved] == record[:saved]


def test_the_example_is_a_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile  # seconds to import

    assert dict(fetch_hostfile(str(ROOT / "launch" / "hostfile.example"))) == {
        "worker-1": 8,
        "worker-2": 8,
    }
