"""A run's folder belongs to one run: a second start changes nothing, and a dead run's folder is
free.
"""

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mc_ds.storage import Lock
from mc_ds.training.guards.exit_codes import ExitCode
from tests.support.fault_ranks import Ranks, records, start, tiny
from tests.support.tiny_run import TIMEOUT_S, write_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owners")
    write_library(folder / "library")
    start(folder, 1, tiny(folder, "calm")).finish()
    return folder


def contents(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
    }


def start_paused(folder: Path, world_size: int, config: dict[str, Any], step: int = 4) -> Ranks:
    """A run whose rank 0 waits before a step for the file `NAME.go`."""
    name = config["name"]
    files = [str(folder / f"{name}.{word}") for word in ("paused", "go")]
    ranks = start(folder, world_size, config, faults={0: ["pause", step, *files]})
    deadline = time.monotonic() + TIMEOUT_S
    while not Path(files[0]).exists():
        assert time.monotonic() < deadline, ranks.text()
        assert ranks.processes[0].is_alive(), ranks.text()
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("resume", ["auto", "never", "path"])
def test_a_second_start_is_one_line_and_changes_nothing(folder: Path, resume: str) -> None:
    config, name = tiny(folder, f"twice-{resume}"), f"twice-{resume}"
    run = folder / "runs" / name
    first = start_paused(folder, 2, config)
    left_by_a_save = run / "checkpoints" / "step_00000009.partial-0123456789abcdef"
    left_by_a_save.mkdir()
    before = contents(run)
    assert any(name.startswith("checkpoints/step_00000003/") for name in before)
    wanted = str(folder / "runs" / "calm") if resume == "path" else resume
    for world_size in (1, 2):
        other = dict(config, resume=wanted, train=dict(config["train"], learning_rate=1e-5))
        second = start(folder, world_size, other)
        assert second.wait() == [ExitCode.CONFIG] * world_size
        (line,) = second.errors()
        pid = first.processes[0].pid
        assert re.search(rf"{re.escape(str(run))} is in use by process {pid} on \S+ since", line)
        assert line.endswith(": wait for it, end it, or use another --name")
        assert contents(run) == before
        assert left_by_a_save.exists()
    (folder / f"{name}.go").touch()
    first.finish()
    assert [record["step"] for record in records(folder, name)] == list(range(1, 7))
    assert not (run / "lock").exists()


def test_the_folder_of_a_dead_run_is_free(folder: Path) -> None:
    config = tiny(folder, "dead")
    first = start_paused(folder, 1, config)
    first.signal(signal.SIGKILL)
    first.kill()
    assert (folder / "runs" / "dead" / "lock").exists()
    second = start(folder, 1, config)
    second.finish()
    assert "resumes after step 3 from" in second.text()
    assert [record["step"] for record in records(folder, "dead")] == list(range(1, 7))
    assert not (folder / "runs" / "dead" / "lock").exists()


def test_a_refused_start_frees_the_folder(folder: Path) -> None:
    config = tiny(folder, "refused")
    start(folder, 1, config).finish()
    other = dict(config, seed=5)
    assert start(folder, 1, other).wait() == [ExitCode.CONFIG]
    Lock(folder / "runs" / "refused" / "lock").release()


def test_a_run_whose_record_is_moved_ends_with_one_line(folder: Path) -> None:
    run = folder / "runs" / "moved"
    ranks = start(
        folder, 2, tiny(folder, "moved"), faults={1: ["move_record", 3, str(run / "elsewhere")]}
    )
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.endswith(
        f"cannot write {run}/metrics.jsonl: it was moved or removed while the run wrote to it"
    )
    assert not (run / "metrics.jsonl").exists()


def test_a_run_whose_folder_was_taken_over_saves_nothing(folder: Path) -> None:
    config = tiny(folder, "taken")
    run = folder / "runs" / "taken"
    ranks = start_paused(folder, 1, config, step=2)
    (run / "lock").rename(run / "lock.old")
    (run / "lock").write_text("another owner's")
    (folder / "taken.go").touch()
    assert ranks.wait() == [ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert "the run folder: the lock was lost to another process" in line
    assert list((run / "checkpoints").iterdir()) == []
    assert (run / "lock").read_text() == "another owner's"
