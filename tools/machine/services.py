"""Checks of services around a run: Slurm, Weights & Biases."""

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
"""Slurm's default time from TERM to KILL; a checkpoint must fit into it when a job is cancelled."""
CONNECT_TIMEOUT_S = 3.0


def check_slurm() -> Iterator[Finding]:
    """Check whether jobs can be submitted from here, and how the site ends and requeues them."""
    if shutil.which("sbatch") is None:
        yield Finding(
            Status.OK,
            "slurm",
            "not on this machine: use deepspeed or torchrun (launch/hostfile.example)",
        )
        return
    done = _run("scontrol", "show", "config")
    if done is None or done.returncode:
        reason = "scontrol does not answer" if done is None else " ".join(done.stderr.split())[:100]
        yield Finding(
            Status.WARN,
            "slurm",
            f"installed, but no controller answers ({reason})",
            "ask the site, or set SLURM_CONF",
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
            "stop jobs with scancel --batch --signal=USR1 JOB, which waits for the checkpoint,"
            " instead of scancel JOB"
        )
        yield Finding(
            Status.WARN, "slurm", f"a cancelled job is killed {wait} s after TERM (KillWait)", fix
        )
    if settings.get("JobRequeue") == "0" and settings.get("PreemptMode", "OFF") == "OFF":
        yield Finding(
            Status.OK,
            "slurm",
            "the site does not requeue by default (JobRequeue 0): launch/slurm/train.sbatch asks"
            " for it",
        )


def check_wandb(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check in which mode metrics would be mirrored, and whether the server can be reached."""
    from mc_ds.training.telemetry.wandb_sink import wandb_mode

    if find_spec("wandb") is None:
        yield Finding(
            Status.WARN,
            "wandb",
            "not installed: metrics.jsonl alone is written",
            "pip install wandb, or --telemetry.wandb=false",
        )
        return
    try:
        mode = wandb_mode(environ)
    except ValueError as error:
        yield Finding(Status.FAIL, "wandb", str(error), "unset WANDB_MODE")
        return
    if mode != "online":
        asked = "WANDB_MODE" if environ.get("WANDB_MODE") else "no key"
        fix = (
            ""
            if asked == "WANDB_MODE"
            else (
                "for live curves: wandb login, or WANDB_API_KEY; later: wandb sync"
                " RUN/wandb/offline-*"
            )
        )
        yield Finding(Status.OK, "wandb", f"{mode} ({asked})", fix)
        return
    address = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host, port = address.hostname or "", address.port or 443
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        fix = "WANDB_MODE=offline on nodes without internet, then wandb sync from one that has it"
        yield Finding(
            Status.WARN, "wandb", f"online, but {host}:{port} cannot be reached ({error})", fix
        )
    else:
        yield Finding(Status.OK, "wandb", f"online, {host} answers")


def _run(*command: str) -> "subprocess.CompletedProcess[str] | None":
    """Return the output of a program; None where it is missing or takes more than five seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
