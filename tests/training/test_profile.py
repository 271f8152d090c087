"""Profiling: only the steps asked for are traced, with their phases; what the phases cost is said."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mc_ds.training.telemetry.profile import Profile


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of profiles on a CPU, which only `run` moves on."""
    clock = SimpleNamespace(now=0.0)
    moved = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("mc_ds.training.telemetry.profile.time", moved)
    return clock


def run(profile: Profile, steps: int, clock: SimpleNamespace) -> list[list[str]]:
    """Take steps of two phases, of 5 and 20 ms; return what was said before each and after."""
    said = []
    for step in range(steps):
        said.append(profile.between(step))
        profile.mark("quick")
        torch.ones(2) + step
        clock.now += 0.005
        profile.mark("slow")
        clock.now += 0.02
        profile.mark("between steps")
    return [*said, profile.between(steps)]


def test_the_steps_asked_for_are_traced_with_their_phases(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    marks: list[str] = []
    before, first, second, after, end = run(
        Profile((1, 2), tmp_path, torch.device("cpu"), marks.append), 4, clock
    )
    assert (before, first, second, end) == ([], [], [], [])
    path = tmp_path / "trace_step_00000001.json.gz"
    assert after[0].startswith(f"profile of 2 steps: {path} (open it in https://ui.perfetto.dev)")
    cost = {line.split()[2]: float(line.split()[0]) for line in after[1:]}
    assert cost == {"slow": 20.0, "quick": 5.0, "between": 0.0}
    assert [line.split()[2] for line in after[1:]] == ["slow", "quick", "between"]
    assert [line.split()[1] for line in after[1:]] == ["80%", "20%", "0%"]
    assert all(re.match(r" +\d+\.\d\d  +\d+%  ", line) for line in after[1:])
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    ranges = [name for name in names if name in ("quick", "slow")]
    assert (ranges.count("quick"), ranges.count("slow")) == (2, 2)
    assert names.count("aten::add") == 2
    assert marks.count("slow") == 4


def test_without_a_wish_marks_are_handed_on_and_nothing_is_written(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    marks: list[str] = []
    said = run(Profile(None, tmp_path, torch.device("cpu"), marks.append), 2, clock)
    assert said == [[], [], []]
    assert marks == ["quick", "slow", "between steps"] * 2
    assert list(tmp_path.iterdir()) == []
