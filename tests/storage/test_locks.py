"""Locks: one owner at a time, between threads, processes and hosts; a dead owner's lock is taken
over.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import mc_ds.storage.locks as locks
from mc_ds.config import ConfigError
from mc_ds.storage import Lock, LockHeldError
from mc_ds.storage.owner import this_process
from tests.support.processes import ROOT

HOLD = """
import sys
from pathlib import Path
from mc_ds.storage import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> "subprocess.Popen[str]":
    """A process that holds a lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path) as lock:
        lock.check()
        with pytest.raises(LockHeldError, match=f"lock is in use by process {os.getpid()} on .* s"):
            Lock(path)
    with Lock(path):
        pass
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_last_reference(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    del lock
    Lock(tmp_path / "lock").release()


def test_a_lock_outlives_no_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as process:
        with pytest.raises(LockHeldError, match=f"process {process.pid} on "):
            Lock(path)
        process.kill()
    assert path.exists()
    Lock(path).release()
    with hold(path) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    with hold(tmp_path / "lock") as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        Lock(tmp_path / "lock").release()


def test_a_forked_child_does_not_free_the_lock(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock") as lock:
        if (child := os.fork()) == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        lock.check()


def test_a_copied_lock_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run" / "lock"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        Lock(tmp_path / "copy" / "lock").release()


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    owner = replace(this_process(), pid=os.getppid(), started="1")
    path.write_text(json.dumps(asdict(owner)))
    Lock(path).release()


class OtherHost:
    """A lock that a process of another host made, and time that passes only where somebody
    waits.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.now, self.said = path, 0.0, list[str]()
        self.each_second: Callable[[], object] = lambda: None
        owner = replace(this_process(), host="node7", pid=1, kernel="another boot pid:[1]")
        path.write_text(json.dumps(asdict(owner)))
        monkeypatch.setattr(locks.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(locks.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.each_second()

    def beat(self) -> None:
        os.utime(self.path, ns=(0, int(self.now * 1e9) + 1))


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OtherHost:
    return OtherHost(tmp_path / "lock", monkeypatch)


def test_an_owner_elsewhere_lives_while_it_shows_signs(other_host: OtherHost) -> None:
    other_host.each_second = lambda: other_host.now >= 20 and other_host.beat()
    with pytest.raises(LockHeldError, match="process 1 on node7 since"):
        Lock(other_host.path, report=other_host.said.append)
    assert 20 <= other_host.now < locks.LEASE_S
    assert "is held by process 1 on node7" in other_host.said[0]


def test_an_owner_elsewhere_that_is_silent_is_dead(other_host: OtherHost) -> None:
    with Lock(other_host.path) as lock:
        lock.check()
    assert other_host.now >= locks.LEASE_S
    assert list(other_host.path.parent.iterdir()) == []


def test_an_owner_elsewhere_that_lets_go_is_not_waited_for(other_host: OtherHost) -> None:
    other_host.each_second = lambda: other_host.path.unlink(missing_ok=True)
    Lock(other_host.path).release()
    assert other_host.now < 5


def test_the_owner_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    with Lock(tmp_path / "lock"):
        os.utime(tmp_path / "lock", ns=(0, 0))
        while not (tmp_path / "lock").stat().st_mtime_ns:
            pass


def test_an_owner_that_stood_still_finds_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path) as lock:
        (tmp_path / "new").write_text("another's")
        os.replace(tmp_path / "new", path)
        with pytest.raises(OSError, match="the lock was lost to another process"):
            lock.check()
    assert path.read_text() == "another's"


@pytest.mark.parametrize("kind", ["text", "json", "link", "folder", "pipe"])
def test_a_users_file_is_no_lock(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "lock", tmp_path / "other"
    other.write_text("mine")
    match kind:
        case "text":
            path.write_text("mine")
        case "json":
            path.write_text('{"pid": 1}')
        case "link":
            path.symlink_to(other)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    with pytest.raises(ConfigError, match="lock is not a lock of mc_ds: move it away"):
        Lock(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "other"}
    assert other.read_text() == "mine"


def test_a_full_disk_has_room_for_a_lock_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        lock = Lock(tmp_path / "lock")
    assert (tmp_path / "lock").read_bytes() == b""
    other = OtherHost(tmp_path / "other", monkeypatch)
    other.each_second = lambda: os.utime(tmp_path / "lock")
    with pytest.raises(LockHeldError, match="in use by an unknown process"):
        Lock(tmp_path / "lock")
    lock.release()
    assert not (tmp_path / "lock").exists()
