"""What `train.sbatch` starts, and when it goes back into the queue; `srun` and `scontrol` stand in
for Slurm's.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT, bare
from tests.support.tiny_run import TIMEOUT_S

SRUN = """#!/usr/bin/env bash
[[ -z $SIGNAL ]] || { kill -"$SIGNAL" "$PPID"; sleep 1; }
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >> "$REQUEUED"; else echo node; fi
"""


@pytest.mark.parametrize(
    ("code", "signal", "restarts", "ends", "requeued"),
    [
        (0, "", "", 0, False),
        (2, "", "", 2, False),
        (1, "", "", 1, False),
        (85, "", "", 85, True),
        (85, "", "1000", 85, True),
        (82, "", "", 85, True),
        (83, "", "4", 85, True),
        (84, "", "", 85, True),
        (82, "", "5", 82, False),
        (83, "", "5", 83, False),
        (138, "USR1", "4", 85, True),
        (138, "USR1", "5", 138, False),
        (138, "", "", 138, False),
        (82, "TERM", "", 82, False),
        (85, "TERM", "", 143, False),
    ],
)
def test_a_job_is_requeued_for_what_a_restart_can_mend_and_not_forever(
    code: int, signal: str, restarts: str, ends: int, requeued: bool, tmp_path: Path
) -> None:
    log = tmp_path / "requeued"
    restarted = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    ours = dict(CODE=str(code), SIGNAL=signal, REQUEUED=str(log))
    done = submit(tmp_path, SRUN, **restarted, **ours)
    assert (done.returncode, log.exists()) == (ends, requeued), done.stderr
    if not requeued and code in (82, 83) and not signal:
        assert "was restarted 5 times: not requeued again" in done.stderr


SAYS = """#!/usr/bin/env bash
printf '%s\\n' "$@"
env | grep -E '^(TORCH|TRITON)' | sort
"""


def test_the_site_decides_container_and_scratch_and_caches_are_the_nodes(tmp_path: Path) -> None:
    said = submit(tmp_path, SAYS, NODE_SCRATCH="/local").stdout.splitlines()
    assert "--label" in said
    assert not [line for line in said if line.startswith("--container")]
    assert "TRITON_CACHE_DIR=/given" not in said
    assert "TORCHINDUCTOR_CACHE_DIR=/local/mc_ds-" in "\n".join(said)
    (tmp_path / "launch/slurm/site.sh").write_text(
        "export NODE_SCRATCH=/fast TRITON_CACHE_DIR=/given\ncontainer=(--container-image=a.sqsh)\n"
    )
    said = submit(tmp_path, SAYS, NODE_SCRATCH="/local").stdout.splitlines()
    assert said.index("--container-image=a.sqsh") < said.index("python")
    assert "TRITON_CACHE_DIR=/given" in said
    assert "TORCHINDUCTOR_CACHE_DIR=/fast/mc_ds-" in "\n".join(said)


def test_each_rank_may_have_a_log_of_its_own(tmp_path: Path) -> None:
    said = submit(tmp_path, SAYS, RANK_LOGS="logs/mine").stdout.splitlines()
    assert "--output=logs/mine/%x-%j-rank%t.log" in said
    assert "--open-mode=append" in said
    assert "--label" not in said
    assert (tmp_path / "logs" / "mine").is_dir()


def submit(folder: Path, srun: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `train.sbatch` in a clone at `folder`, with `srun` as a program of this text."""
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shutil.copytree(
        ROOT / "launch/slurm",
        folder / "launch/slurm",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("site.sh"),
    )
    slurm = dict(
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node",
        SLURM_NNODES="1",
        SLURM_NTASKS_PER_NODE="1",
        SLURM_CPUS_ON_NODE="1",
    )
    return subprocess.run(
        ["bash", folder / "launch/slurm/train.sbatch"],
        cwd=folder,
        env=bare({"PATH": f"{folder}:{os.environ['PATH']}", "REQUEUED": "", **slurm, **variables}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
