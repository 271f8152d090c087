"""Hosts on this machine: each has its own network, name, mounts and process ids, and dies whole
with its first process.

A host is a set of Linux namespaces held by one process. Killing that process kills everything
that runs on the host and removes its network and mounts, so nothing outlives a test: the process
dies with the test runner, however that ends. Needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny_run import TIMEOUT_S

NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")
# reaps orphans
FIRST_PROCESS = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"
)


def missing(*programs: str) -> str:
    """Why hosts with these programs cannot be made here; empty where they can."""
    absent = [
        name
        for name in ("unshare", "nsenter", "setpriv", "ip", *programs)
        if shutil.which(name, path=search_path()) is None
    ]
    if absent:
        return (
            f"needs {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge"
            " pdsh openssh-server iproute2"
        )
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True).returncode:
        return "needs root's right to make namespaces (unshare failed)"
    return ""


def search_path() -> str:
    """This interpreter's folder first, and the folders of system daemons."""
    return os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    )


def wait_until(
    condition: Callable[[], Any],
    what: str,
    context: Callable[[], str] = str,
) -> Any:
    """The condition's first true value. Fails with `what` and the `context` of that moment when
    time is up.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}\n{context()}"
        time.sleep(0.1)
    return value


class Host:
    """One host. `binds` maps system files to the ones that take their place there; /run is empty
    and the host's own.
    """

    def __init__(self, name: str, binds: dict[Path, Path] | None = None) -> None:
        self.name = name
        dies_with_us, first = (
            ("setpriv", "--pdeathsig", "KILL"),
            (sys.executable, "-S", "-c", FIRST_PROCESS),
        )
        self._holder = subprocess.Popen(
            [
                *dies_with_us,
                "unshare",
                *NAMESPACES,
                "--mount-proc",
                "--fork",
                "--kill-child",
                *first,
            ]
        )
        self.init = wait_until(
            lambda: next(children(self._holder.pid), None), f"the first process of {name}"
        )
        # Its mounts are complete once /proc is its own, which is when it has become the
        # interpreter.
        wait_until(
            lambda: Path(f"/proc/{self.init}/cmdline").read_bytes().count(b"SIGCHLD"),
            f"{name} to be ready",
        )
        for file, substitute in (binds or {}).items():
            self.run("mount", "--bind", substitute, file)
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.run("hostname", name)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *command: str | Path, directory: Path = Path("/")) -> list[str]:
        """The command line that runs `command` on this host, in `directory`."""
        return [
            "nsenter",
            "--target",
            str(self.init),
            *NAMESPACES,
            "--",
            "env",
            f"--chdir={directory}",
            *map(str, command),
        ]

    def run(
        self,
        *command: str | Path,
        directory: Path = Path("/"),
        variables: dict[str, str] | None = None,
    ) -> str:
        """Runs a program on this host to its end and returns what it printed. Fails where it
        fails.
        """
        line = self.command(*command, directory=directory)
        done = subprocess.run(
            line, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, (
            f"{self.name}: {command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done.stdout

    def start(
        self, *command: str | Path, directory: Path, variables: dict[str, str], output: Path
    ) -> "subprocess.Popen[bytes]":
        """Starts a program on this host; its output is appended to a file."""
        line = self.command(*command, directory=directory)
        with output.open("ab") as file:
            return subprocess.Popen(
                line, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def scripts(self, script: str) -> list[int]:
        """Process ids (as this test sees them) of the Python processes on this host that run a
        script.
        """
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                program, *arguments = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                )
                here = os.readlink(f"/proc/{pid}/ns/pid") == space
            except OSError:
                continue  # it has just ended
            first = next((argument for argument in arguments if not argument.startswith("-")), "")
            if here and Path(program).name.startswith("python") and first == script:
                found.append(pid)
        return sorted(found)

    def kill(self) -> None:
        """The host is gone, with everything on it."""
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()


def children(pid: int) -> Iterator[int]:
    """Process ids of a process's children."""
    try:
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return


def connect(first: Host, second: Host, addresses: Sequence[str]) -> None:
    """A cable between two hosts: eth0 on both, with these addresses."""
    peers = [
        "netns",
        str(first.init),
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        str(second.init),
    ]
    subprocess.run(["ip", "link", "add", "eth0", *peers], check=True)
    for host, address in zip((first, second), addresses, strict=True):
        host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
