"""Whoever is killed between any two system calls leaves the old or the new under its name,
whole, and nothing in the way of the next.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

import mc_ds.storage.folders as folders
from mc_ds.storage import (
    Lock,
    StagedFolder,
    damage,
    recover,
    remove_folder,
    replace_text,
    write_manifest,
    write_text,
)
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.checkpoint.folder import (
    all_checkpoints,
    checkpoint_name,
    list_checkpoints,
    publish,
    remove_surplus,
)
from tests.support.kills import kill_everywhere
from tests.support.sessions import history, inference_model
from tests.support.tiny_bundle import write

USERS_OWN = ("notes", "notes.new", "notes.old", "notes.partial", "notes.replaced-by-me")
"""Names of folders that a person may have beside the one that is written, `out`."""


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves what the system's cache holds: flushing is counted and takes no time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["one step", "two steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file system replaces a folder."""
    if request.param == "two steps":
        monkeypatch.setattr(folders, "_exchange", lambda new, old: False)
    return request.param


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder in which a person keeps things of their own."""
    for name in USERS_OWN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    return tmp_path


def assert_only(place: Path, *names: str) -> None:
    """All that the person had is there, and of the rest these."""
    assert {path.name for path in place.iterdir()} == {*USERS_OWN, *names}
    assert all((place / name / "mine.txt").read_text() == "mine" for name in USERS_OWN)


def write_folder(out: Path, text: str) -> None:
    with StagedFolder(out) as staged:
        (staged.path / "inner").mkdir()
        files = {name: write_text(staged.path / name, text) for name in ("a", "inner/b")}
        write_manifest(staged.path, files)
        staged.publish(replaces=lambda path: None)


def clear(out: Path) -> None:
    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_file_is_replaced(place: Path) -> None:
    out = place / "out"

    def check() -> None:
        assert out.read_text() in ("old", "new")

    kills = kill_everywhere(
        lambda: (clear(out), replace_text(out, "old")),
        lambda: replace_text(out, "new"),
        check,
    )
    assert kills >= 4
    assert out.read_text() == "new"


def test_a_folder_is_replaced(place: Path, steps: str) -> None:
    out = place / "out"
    found = set()

    def check() -> None:
        if steps == "two steps":
            recover(out)
        assert damage(out) is None
        text = (out / "a").read_text()
        assert (out / "inner" / "b").read_text() == text
        found.add(text)
        write_folder(out, "next")
        assert (out / "a").read_text() == "next"
        assert_only(place, "out")

    kills = kill_everywhere(
        lambda: (clear(out), write_folder(out, "old")), lambda: write_folder(out, "new"), check
    )
    assert kills >= 20
    assert found == {"old", "new"}
    assert_only(place, "out")


def test_a_folder_appears(place: Path) -> None:
    out = place / "out"

    def check() -> None:
        recover(out)
        assert not out.exists() or damage(out) is None
        write_folder(out, "next")
        assert_only(place, "out")

    assert kill_everywhere(lambda: clear(out), lambda: write_folder(out, "new"), check) >= 15


def test_a_folder_is_removed(place: Path) -> None:
    out = place / "out"

    def check() -> None:
        assert not out.exists() or damage(out) is None
        write_folder(out, "next")
        assert_only(place, "out")

    kills = kill_everywhere(
        lambda: (clear(out), write_folder(out, "old")), lambda: remove_folder(out), check
    )
    assert kills >= 4


def test_a_lock_is_free_when_its_owner_is_dead(place: Path) -> None:
    def check() -> None:
        with Lock(place / "out"):
            assert_only(place, "out")
        assert_only(place)

    def lock_twice() -> None:
        for _ in range(2):
            Lock(place / "out").release()

    assert kill_everywhere(lambda: None, lock_twice, check) >= 8


def test_a_lock_is_taken_over_by_one_that_dies(place: Path) -> None:
    """The takeover of a dead owner's lock is itself a lock."""
    lock = place / "out"

    def leave_a_dead_lock() -> None:
        clear(lock)
        with Lock(lock):
            content = lock.read_bytes()
        lock.write_bytes(content)  # nobody has it open

    def check() -> None:
        Lock(lock).release()
        assert not lock.exists()
        leave_a_dead_lock()
        (place / "out.takeover").write_bytes(lock.read_bytes())
        Lock(lock).release()
        assert_only(place)

    assert kill_everywhere(leave_a_dead_lock, lambda: Lock(lock).release(), check) >= 10


def test_a_checkpoint_is_published_and_older_ones_are_removed(place: Path, steps: str) -> None:
    run = place / "out"

    def save(step: int) -> None:
        final = run / checkpoint_name(step)
        with StagedFolder(final, lock=False) as staged:
            files = {name: write_text(staged.path / name, f"{step}") for name in ("a", "b")}
            write_manifest(staged.path, files)
            publish(staged)
        remove_surplus(final, keep_last=2, keep_every=0)

    def check() -> None:
        steps_found = [int(path.name.removeprefix("step_")) for path in all_checkpoints(run)]
        assert list_checkpoints(run) == all_checkpoints(run)
        assert steps_found in ([4, 2], [6, 4, 2], [6, 4])
        save(8)
        assert len(list(run.iterdir())) == 3  # two checkpoints and `latest`

    def prepare() -> None:
        clear(run)
        run.mkdir()
        save(2)
        save(4)

    kills = kill_everywhere(prepare, lambda: (save(4), save(6)), check)
    assert kills >= 40


def test_a_bundle_is_replaced(place: Path, steps: str) -> None:
    out = place / "out"
    write(place / "old")
    found = set()

    def check() -> None:
        bundle = open_bundle(out)
        found.add(bundle.manifest["source"])
        bundle.load()

    def prepare() -> None:
        clear(out)
        write(out, source="old")

    kills = kill_everywhere(prepare, lambda: write(out, source="new", overwrite=True), check)
    shutil.rmtree(place / "old")
    assert kills >= 40
    assert found == {"old", "new"}
    assert_only(place, "out")


def test_a_saved_session_is_replaced(place: Path, steps: str) -> None:
    net, out = inference_model(), place / "out"
    old, new = net.session("recency", 48), net.session("recency", 48)
    old.ingest(history(100))
    new.ingest(history(130, seed=1))
    for session in (old, new):
        session.generate(1)
    found = set()

    def check() -> None:
        with net.load_session(out) as session:
            found.add(len(session))
            expected = old if len(session) == len(old) else new
            ids = torch.as_tensor(session.tree.tokens(0, len(session)))
            assert torch.equal(ids, torch.as_tensor(expected.tree.tokens(0, len(expected))))

    kills = kill_everywhere(lambda: (clear(out), old.save(out)), lambda: new.save(out), check)
    assert kills >= 40
    assert found == {len(old), len(new)}
    assert_only(place, "out")
