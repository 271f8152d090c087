"""Memory of the host that a process may still take: the least of the host's and its cgroups'."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mc_ds.training.checkpoint.host_memory import available_memory


def group(folder: Path, *, limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\ninactive_file {cached}\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    path.write_text("0::/slurm/job_7/step_0\n")
    return path


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes that the host has left, of many more."""
    memory = SimpleNamespace(total=10**9, available=30_000, free=20_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory.available


def test_the_tightest_cgroup_above_the_process_counts(tmp_path: Path, own: Path) -> None:
    groups = tmp_path / "cgroup"
    group(groups / "slurm/job_7/step_0", limit="max", used=100)
    group(groups / "slurm/job_7", limit="5000", used=3500, cached=200)
    group(groups / "slurm", limit="9000", used=3500)
    group(groups / "slurm/job_8", limit="10", used=10)
    assert available_memory(groups, own) == 5000 - 3500 + 200


@pytest.mark.parametrize("content", ["0::/\n", "11:memory:/docker/1\n", ""])
def test_without_a_limit_it_is_what_the_host_has_left(
    tmp_path: Path, own: Path, host: int, content: str
) -> None:
    own.write_text(content)
    for folder, path in ((tmp_path / "none", own), (tmp_path, tmp_path / "no file")):
        assert available_memory(folder, path) == host


def test_a_limit_above_what_the_host_has_left_does_not_count(
    tmp_path: Path, own: Path, host: int
) -> None:
    groups = tmp_path / "cgroup"
    group(groups / "slurm", limit=str(host + 101), used=100)
    assert available_memory(groups, own) == host
    group(groups / "slurm", limit=str(host + 99), used=100)
    assert available_memory(groups, own) == host - 1
