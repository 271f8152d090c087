"""When `train.sbatch` goes back into the queue, by its exit code; `srun` and `scontrol` stand in
for Slurm's.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.tiny_run import ROOT, TIMEOUT_S

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
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = dict(
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node",
        SLURM_NNODES="1",
        SLURM_NTASKS_PER_NODE="1",
        SLURM_CPUS_ON_NODE="1",
        **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    )
    log = tmp_path / "requeued"
    ours = dict(CODE=str(code), SIGNAL=signal, REQUEUED=str(log))
    script = tmp_path / "train.sbatch"
    script.write_text((ROOT / "launch/slurm/train.sbatch").read_text())
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script],
        cwd=tmp_path,
        env={"PATH": path, **slurm, **ours},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, log.exists()) == (ends, requeued), done.stderr
    if not requeued and code in (82, 83) and not signal:
        assert "was restarted 5 times: not requeued again" in done.stderr
