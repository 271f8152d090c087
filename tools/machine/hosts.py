"""Communication tests ("round trips") between ranks: on the hosts of a hostfile, between the ranks
of a launcher, or on this machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine.findings import PROBE_PREFIX, Finding, Status
from mc_ds.config import ConfigError

PROBE = (str(Path(__file__).parents[1] / "doctor.py"), "--probe")
"""Command of one rank of a round trip, for a launcher."""
TIMEOUT_S = 90.0
"""Time limit of a round trip, including the start of its processes."""
LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")
"""What the `deepspeed` script runs. Where PYTHONPATH makes packages known, there may be no script.
"""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
SLOW_GB_PER_S = {"nccl": 10.0, "gloo": 0.05}
"""Below this speed, ranks probably use a wrong transport: TCP instead of InfiniBand or NVLink, or a
management network.
"""

ADDRESSES = (
    "host names must resolve to addresses that all hosts can reach (not 127.0.1.1); set"
    " GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; open firewalls"
)


def check_hostfile(hostfile: Path, master_addr: str | None = None) -> Iterator[Finding]:
    """Check ssh to every host, then run a round trip with `deepspeed --hostfile`."""
    from deepspeed.launcher.runner import fetch_hostfile

    slots = fetch_hostfile(str(hostfile))
    if not slots:
        yield Finding(
            Status.FAIL,
            "hosts",
            f"{hostfile} is missing or has no hosts",
            "give the path of a file like launch/hostfile.example",
        )
        return
    if shutil.which("pdsh") is None:
        yield Finding(
            Status.FAIL,
            "hosts",
            "pdsh is missing, which deepspeed needs to start ranks on other hosts",
            "apt-get install pdsh",
        )
        return
    with ThreadPoolExecutor(max_workers=32) as pool:
        errors = [error for error in pool.map(_ssh_error, slots) if error]
    if errors:
        yield Finding(
            Status.FAIL,
            "ssh",
            "; ".join(errors),
            "make ssh HOST work from here without a password or a prompt",
        )
        return
    yield Finding(Status.OK, "ssh", f"works to {len(slots)} hosts: {', '.join(slots)}")
    options = [
        "--hostfile",
        str(hostfile),
        *(["--master_addr", master_addr] if master_addr else []),
    ]
    yield from _parse_output(
        _run([*LAUNCHER, *options, "--no_local_rank", *PROBE]), sum(slots.values())
    )


def check_local() -> Iterator[Finding]:
    """Run a round trip between one rank per GPU of this machine, or between two ranks on CPUs."""
    import torch

    count = torch.cuda.device_count() or 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common = os.environ | rendezvous | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, *PROBE]
    with ThreadPoolExecutor(max_workers=count) as pool:
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        outputs = list(pool.map(lambda environ: _run(command, environ), ranks))
    yield from _parse_output("\n".join(outputs), count)


def check_ranks() -> Iterator[Finding]:
    """Run a round trip between the processes of a launcher. All of them must call it."""
    import torch.distributed as dist

    from machine.probe import round_trip
    from mc_ds.training.ranks.distributed import read_rank_environment

    try:
        report = round_trip(read_rank_environment())
    except ConfigError as error:
        yield Finding(Status.FAIL, "round trip", str(error), ADDRESSES)
        return
    dist.destroy_process_group()
    yield from assess(report)


def assess(report: dict[str, Any]) -> Iterator[Finding]:
    """Check the report of `probe.round_trip`: correct sums, sufficient speed, equal versions."""
    hosts, facts, backend = report["hosts"], report["facts"], report["backend"]
    where = (
        f"{len(hosts)} ranks on {len(set(hosts))} hosts"
        if len(hosts) > 1
        else f"one rank on {hosts[0]}"
    )
    found = (
        f"{backend}, {where}: {report['latency_ms']:.2f} ms, {report['gb_per_s']:.2f} GB/s per rank"
    )
    if not report["correct"]:
        yield Finding(
            Status.FAIL,
            "round trip",
            f"{backend}, {where}: the sum over the ranks is wrong",
            "find the faulty host with nccl-tests, and replace it",
        )
    elif len(hosts) > 1 and report["gb_per_s"] < SLOW_GB_PER_S[backend]:
        fix = (
            "slow: find out the transport with NCCL_DEBUG=INFO (GPUs); set NCCL_SOCKET_IFNAME or"
            " GLOO_SOCKET_IFNAME to the fast interface"
        )
        yield Finding(Status.WARN, "round trip", found, fix)
    else:
        yield Finding(Status.OK, "round trip", found)
    for key in facts[0]:
        values = {host: fact.get(key, "missing") for host, fact in zip(hosts, facts, strict=True)}
        if len(set(values.values())) > 1:
            status = Status.WARN if key == "GPU" else Status.FAIL
            text = ", ".join(f"{value} on {host}" for host, value in values.items())
            yield Finding(
                status,
                "round trip",
                f"{key} differs: {text}",
                "install the same environment on all hosts",
            )


def _parse_output(output: str, ranks: int) -> Iterator[Finding]:
    """Check the report in the ranks' output. If it is missing, yield a FAIL with their errors."""
    for line in output.splitlines():
        before, prefix, text = line.partition(PROBE_PREFIX)
        if prefix and not before.strip(": ").count(" "):
            yield from assess(json.loads(text))
            return
    errors = [
        line.strip() for line in output.splitlines() if "error:" in line.lower()
    ] or output.strip().splitlines()[-3:]
    yield Finding(
        Status.FAIL,
        "round trip",
        f"{ranks} ranks could not connect: {' | '.join(errors)[:600] or 'they printed nothing'}",
        ADDRESSES,
    )


def _run(command: Sequence[str], environ: dict[str, str] | None = None) -> str:
    """Run a program and return its output. It is ended after TIMEOUT_S."""
    with subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            return f"{process.communicate()[0]}\nerror: not finished within {TIMEOUT_S:g} s"


def _ssh_error(host: str) -> str:
    """Run a command on a host with ssh, and return its error; empty if it works."""
    done = subprocess.run(
        [*SSH, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return (
        f"{host}: {' '.join(done.stderr.split()) or f'ssh exited with {done.returncode}'}"
        if done.returncode
        else ""
    )
