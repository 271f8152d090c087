"""Checkpoint folders: written aside, found only when whole, kept in the right number."""

import os
from pathlib import Path

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.training.checkpoint import find_checkpoint, list_checkpoints, save_checkpoint
from mc_ds.training.checkpoint.universal import convert
from mc_ds.training.guards.watchdog import Watchdog


class Engine:
    """Hands one file to its checkpoint engine, as DeepSpeed's would hand many."""

    checkpoint_engine = None
    fail = False

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        assert not save_latest  # it would name a checkpoint that is not whole yet
        if self.fail:
            raise OSError("disk full")
        self.checkpoint_engine.save(client_state, str(Path(folder) / tag / "model.pt"))


@pytest.fixture
def save(single_process, tmp_path):
    """Saves checkpoints of one rank in `tmp_path`."""

    def call(*steps, engine=None, keep_last=2, watchdog=None):
        for step in steps:
            trainer_state = {"world_size": 1, "lensnet_calls": 4 * step}
            save_checkpoint(
                tmp_path,
                engine or Engine(),
                step=step,
                lens_state={"step": step},
                trainer_state=trainer_state,
                keep_last=keep_last,
                watchdog=watchdog or Watchdog(0, 0, tmp_path),
            )

    return call


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_checkpoint_holds_what_was_saved(save, tmp_path):
    save(7)
    checkpoint = tmp_path / "step_00000007"
    assert torch.load(checkpoint / "lens.pt", weights_only=True) == {"step": 7}
    assert torch.equal(
        torch.load(checkpoint / "model.pt", weights_only=True)["torch_rng"], torch.get_rng_state()
    )
    assert '"lensnet_calls": 28' in (checkpoint / "trainer.json").read_text()


class Copying(Engine):
    """Leaves a file of its own, as an NVMe offload does."""

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        super().save_checkpoint(folder, tag, client_state, save_latest)
        (Path(folder) / tag / "offloaded").write_text("moments")


def test_each_file_that_is_written_or_hashed_is_a_sign_of_life(save, tmp_path):
    class Noting(Watchdog):
        phases = []

        def mark(self, phase):
            self.phases.append(phase)

        def rest(self, phase):
            self.phases.append("rests")

    save(7, engine=Copying(), watchdog=Noting(0, 0, tmp_path))
    files = [phase for phase in Noting.phases if phase.startswith("checkpoint: ")]
    named = ["model.pt", "lens.pt", "trainer.json", "hash of offloaded"]
    assert [phase for phase in files if phase.split(": ")[1] in named] == [
        f"checkpoint: {name}" for name in named
    ]
    assert Noting.phases[-1] == "checkpoint complete", "what follows is timed again"
    after = Noting.phases.index("checkpoint: trainer.json") + 1
    assert Noting.phases[after] == "rests", "the files of other ranks are theirs to time"


def test_the_newest_ones_are_kept(save, tmp_path):
    save(2, 4, 6, 8, 10, keep_last=3)
    assert names(tmp_path) == ["step_00000010", "step_00000008", "step_00000006"]
    assert (tmp_path / "latest").read_text().strip() == "step_00000010"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000006",
        "step_00000008",
        "step_00000010",
    ]


def test_a_run_that_starts_over_keeps_its_own_checkpoints_and_not_those_it_left(save, tmp_path):
    save(100, 200)
    save(10)
    assert names(tmp_path) == ["step_00000010"]
    save(20, 30)
    assert names(tmp_path) == ["step_00000030", "step_00000020"]


def test_saving_a_step_again_replaces_it(save, tmp_path):
    save(3, 6, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_a_save_that_fails_leaves_the_one_before(save, tmp_path):
    save(1)
    broken = Engine()
    broken.fail = True
    with pytest.raises(OSError, match="disk full"):
        save(2, engine=broken)
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step_00000001"
    save(2)  # over whatever was left aside
    assert names(tmp_path) == ["step_00000002", "step_00000001"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over(save, tmp_path, damage):
    save(1, 2)
    newest = tmp_path / "step_00000002"
    match damage:
        case "cut":
            (newest / "model.pt").write_bytes((newest / "model.pt").read_bytes()[:-1])
        case "gone":
            (newest / "lens.pt").unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "torn manifest":
            (newest / "manifest.json").write_text('{"files": {')
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step_00000001"
    with pytest.raises(ConfigError):
        find_checkpoint(str(newest), tmp_path)


def test_resume_means_a_checkpoint_a_run_or_nothing(save, tmp_path):
    assert find_checkpoint("auto", tmp_path / "empty") is None
    save(1, 2)
    older, newer = tmp_path / "step_00000001", tmp_path / "step_00000002"
    assert find_checkpoint("never", tmp_path) is None
    assert find_checkpoint("auto", tmp_path) == newer
    assert find_checkpoint(str(older), tmp_path / "elsewhere") == older
    assert find_checkpoint(str(tmp_path), tmp_path / "elsewhere") == newer
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path)
    assert find_checkpoint(str(run), tmp_path / "elsewhere").name == "step_00000002"
    with pytest.raises(ConfigError, match="use auto, never, or such a path"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.system, (f"touch {self.sprung}",)


def test_the_conversion_called_by_itself_runs_no_command(tmp_path):
    checkpoint, sprung = tmp_path / "step_00000004", tmp_path / "sprung"
    checkpoint.mkdir()
    torch.save({"module": Command(sprung)}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError, match=r"step_00000004 could run code: .* holds posix.system"):
        convert(checkpoint, tmp_path / "out")
    assert not sprung.exists()
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
