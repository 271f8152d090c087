"""The benchmark of checkpoints: what it saves, and that nothing of it is left."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT, inherited
from tests.tools.test_bench_train import RECIPE


def test_checkpoints_are_saved_both_ways_and_removed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "tools/benchmark.py", "checkpoint", "--steps", "2"]
    command += ["--json", str(tmp_path / "out.jsonl"), "--folder", str(tmp_path / "scratch")]
    command += ["--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=inherited(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    record = json.loads(line)
    parameters = sum(record["parameters"].values())
    assert record["checkpoint_bytes"] > 12 * parameters  # float32 weights and two moments
    stalls = record["background_stall_s"]
    assert len(stalls) == len(record["background_published_after_s"]) == 3
    assert all(
        stall <= published
        for stall, published in zip(stalls, record["background_published_after_s"], strict=True)
    )
    assert not list((tmp_path / "scratch").iterdir())
