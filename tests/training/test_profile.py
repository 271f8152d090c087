"""Profiling: only the steps asked for are traced, with their phases; what the phases cost is said."""

import gzip
import json
import re
import time
from pathlib import Path

import torch

from mc_ds.training.telemetry.profile import Profile


def run(profile: Profile, steps: int) -> list[list[str]]:
    """Take steps of two phases, one of which sleeps; return what was said before each and after."""
    said = []
    for step in range(steps):
        said.append(profile.between(step))
        profile.mark("quick")
        torch.ones(2) + step
        profile.mark("slow")
        time.sleep(0.02)
        profile.mark("between steps")
    return [*said, profile.between(steps)]


def test_the_steps_asked_for_are_traced_with_their_phases(tmp_path: Path) -> None:
    marks: list[str] = []
    before, first, second, after, end = run(
        Profile((1, 2), tmp_path, torch.device("cpu"), marks.append), 4
    )
    assert (before, first, second, end) == ([], [], [], [])
    path = tmp_path / "trace_step_00000001.json.gz"
    assert after[0].startswith(f"profile of 2 steps: {path} (open it in https://ui.perfetto.dev)")
    cost = {line.split()[2]: float(line.split()[0]) for line in after[1:]}
    assert after[1].endswith("  slow")
    assert cost["slow"] >= 20
    assert set(cost) == {"quick", "slow", "between"}
    assert all(re.match(r" +\d+\.\d\d  +\d+%  ", line) for line in after[1:])
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    ranges = [name for name in names if name in ("quick", "slow")]
    assert (ranges.count("quick"), ranges.count("slow")) == (2, 2)
    assert names.count("aten::add") == 2
    assert marks.count("slow") == 4


def test_without_a_wish_marks_are_handed_on_and_nothing_is_written(tmp_path: Path) -> None:
    marks: list[str] = []
    said = run(Profile(None, tmp_path, torch.device("cpu"), marks.append), 2)
    assert said == [[], [], []]
    assert marks == ["quick", "slow", "between steps"] * 2
    assert list(tmp_path.iterdir()) == []
