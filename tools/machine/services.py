"""Checks of services: Slurm, Weights & Biases."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from machine.findings import Finding, Status

SHORT_KILL_WAIT_S = 30
"""Slurm's default time between TERM and KILL when a job is cancelled; a checkpoint must fit in."""
CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0


def check_slurm() -> Iterator[Finding]:
    """Check that jobs can be submitted, and the site's settings for ending and requeueing them."""
    if shutil.which("sbatch") is None:
        yield Finding(
            Status.OK,
            "slurm",
            "not installed here: use deepspeed or torchrun (launch/hostfile.example)",
        )
        return
    done = _run("scontrol", "show", "config")
    if done is None or done.returncode:
        reason = "scontrol does not answer" if done is None else " ".join(done.stderr.split())[:100]
        yield Finding(
            Status.WARN,
            "slurm",
            f"installed, but its controller does not answer ({reason})",
            "set SLURM_CONF, or ask the site's administrators",
        )
        return
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", done.stdout, re.MULTILINE))
    states = _run("sinfo", "--noheader", "--format", "%P %D %t %G")
    partitions = (
        "; ".join(states.stdout.split("\n")[:4]).strip("; ") if states is not None else "unknown"
    )
    yield Finding(Status.OK, "slurm", f"{settings.get('SLURM_VERSION', '')}: {partitions}")
    wait = int((re.match(r"\d+", settings.get("KillWait", "")) or ["0"])[0])
    if wait < SHORT_KILL_WAIT_S:
        fix = (
            "stop jobs with scancel --batch --signal=USR1 JOB instead, which waits for the"
            " checkpoint"
        )
        yield Finding(
            Status.WARN, "slurm", f"a cancelled job is killed {wait} s after TERM (KillWait)", fix
        )
    if settings.get("JobRequeue") == "0" and settings.get("PreemptMode", "OFF") == "OFF":
        yield Finding(
            Status.OK,
            "slurm",
            "the site does not requeue jobs by default (JobRequeue 0); launch/slurm/train.sbatch"
            " enables it",
        )


def check_wandb(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check the mode in which metrics would be mirrored, and if online, the connection."""
    from mc_ds.training.telemetry.wandb_sink import wandb_mode

    if find_spec("wandb") is None:
        yield Finding(
            Status.WARN,
            "wandb",
            "not installed: metrics will only be in metrics.jsonl",
            "pip install wandb, or --telemetry.wandb=false",
        )
        return
    try:
        mode = wandb_mode(environ)
    except ValueError as error:
        yield Finding(Status.FAIL, "wandb", str(error), "unset WANDB_MODE")
        return
    if mode != "online":
        cause = "WANDB_MODE" if environ.get("WANDB_MODE") else "no key"
        fix = (
            ""
            if cause == "WANDB_MODE"
            else (
                "to see curves live: wandb login, or set WANDB_API_KEY; to upload later: wandb sync"
                " RUN/wandb/offline-*"
            )
        )
        yield Finding(Status.OK, "wandb", f"{mode} ({cause})", fix)
        return
    address = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host, port = address.hostname or "", address.port or 443
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        fix = "set WANDB_MODE=offline on nodes without internet, then wandb sync from another"
        yield Finding(
            Status.WARN, "wandb", f"online, but {host}:{port} cannot be reached ({error})", fix
        )
    else:
        yield Finding(Status.OK, "wandb", f"online, {host} answers")


def _run(*command: str) -> "subprocess.CompletedProcess[str] | None":
    """Run a program and return its output; None if it is missing or takes over
    COMMAND_TIMEOUT_S seconds.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
