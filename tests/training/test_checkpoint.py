"""Checkpoint folders: written aside, found only when whole, kept in the right number."""

import os
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.training.checkpoint import CheckpointSaver, find_checkpoint, list_checkpoints
from mc_ds.training.checkpoint import save as saving
from mc_ds.training.checkpoint.snapshot import HostBytes
from mc_ds.training.checkpoint.universal import convert
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.saves import Saves
from tests.support.tiny_run import TIMEOUT_S


class Engine:
    """Hands one file to its checkpoint engine, as DeepSpeed's would hand many."""

    checkpoint_engine = None
    fail = False

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        assert not save_latest  # it would name a checkpoint that is not whole yet
        if self.fail:
            raise OSError("disk full")
        self.checkpoint_engine.save(client_state, str(Path(folder) / tag / "model.pt"))


def state(step):
    """What the trainer gives beside the engine."""
    trainer_state = {"world_size": 1, "lensnet_calls": 4 * step}
    return dict(step=step, lens_state={"step": step}, trainer_state=trainer_state)


@pytest.fixture(params=[False, True], ids=["foreground", "background"])
def background(request):
    return request.param


@pytest.fixture
def save(single_process, tmp_path, background):
    """Saves checkpoints of one rank in `tmp_path`."""

    def call(*steps, engine=None, keep_last=2, watchdog=None):
        saver = CheckpointSaver(
            tmp_path,
            engine or Engine(),
            keep_last=keep_last,
            watchdog=watchdog or Watchdog(0, 0, tmp_path),
        )
        for step in steps:
            saver.begin(**state(step), background=background)
            saver.finish()
        saver.finish_removal()

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


class Noting(Watchdog):
    """Keeps the phases it was told of, and sets `told` at each."""

    def __init__(self):
        super().__init__(0, 0, Path())
        self.phases, self.told = [], threading.Event()

    def mark(self, phase):
        self.phases.append(phase)
        self.told.set()

    def rest(self, phase):
        self.mark("rests")


@pytest.mark.parametrize("background", [False], indirect=True)
def test_each_file_that_is_written_or_hashed_is_a_sign_of_life(save):
    watchdog = Noting()
    save(7, engine=Copying(), watchdog=watchdog)
    files = [phase for phase in watchdog.phases if phase.startswith("checkpoint: ")]
    named = ["model.pt", "lens.pt", "trainer.json", "hash of offloaded"]
    assert [phase for phase in files if phase.split(": ")[1] in named] == [
        f"checkpoint: {name}" for name in named
    ]
    assert watchdog.phases[-1] == "checkpoint complete", "what follows is timed again"
    after = watchdog.phases.index("checkpoint: trainer.json") + 1
    assert watchdog.phases[after] == "rests", "the files of other ranks are theirs to time"


def test_files_written_in_the_background_are_signs_of_life_where_training_waits(
    single_process, tmp_path
):
    watchdog = Noting()
    saver = CheckpointSaver(tmp_path, Engine(), keep_last=1, watchdog=watchdog)
    with held_back(saving, "write_tensors") as released:
        saver.begin(**state(1), background=True)
        watchdog.told.clear()
        waiter = threading.Thread(target=lambda: (watchdog.told.wait(), released.set()))
        waiter.start()
        saver.finish()
        waiter.join()
    phases = watchdog.phases
    assert phases[phases.index("checkpoint copied") - 1] == "rests", "others may still copy"
    last = max(number for number, phase in enumerate(phases) if phase == "checkpoint: model.pt")
    assert "rests" in phases[last:], "others may still write"
    assert phases[-1] == "checkpoint complete"


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


class Learning(Engine):
    """An engine whose state changes as soon as it has been saved."""

    def __init__(self):
        self.weights, self.lens = torch.arange(6.0), torch.zeros(2)

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        client_state = {**client_state, "all": self.weights, "last": self.weights[4:]}
        super().save_checkpoint(folder, tag, client_state, save_latest)

    def step(self):
        self.weights += 1
        self.lens += 1


def test_what_is_written_in_the_background_is_the_state_of_its_step(single_process, tmp_path):
    """Training goes on while a file is written; the file is the same as one written at once."""
    written = {}
    for background in (False, True):
        folder, engine = tmp_path / str(background), Learning()
        saver = CheckpointSaver(folder, engine, keep_last=1, watchdog=Watchdog(0, 0, folder))
        given = state(1) | dict(lens_state={"weight": engine.lens})
        with held_back(saving, "write_tensors") if background else nullcontext() as released:
            saver.begin(**given, background=background)
            given["trainer_state"]["lensnet_calls"] += 1
            assert saver.pending
            assert saver.writing == background
            engine.step()
            if background:
                released.set()
            path = saver.finish()
        assert not saver.pending
        assert not saver.writing
        written[background] = {file.name: file.read_bytes() for file in path.iterdir()}
    assert written[True] == written[False]
    saved = torch.load(path / "model.pt", weights_only=True)
    assert saved["all"].tolist() == [0, 1, 2, 3, 4, 5]
    assert saved["last"].untyped_storage().data_ptr() == saved["all"].untyped_storage().data_ptr()


@contextmanager
def held_back(module, name):
    """Calls of a function wait until the event that is given is set."""
    released, function = threading.Event(), getattr(module, name)

    def patient(*args):
        assert released.wait(TIMEOUT_S)
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, patient)
        yield released
        released.set()


def test_without_memory_for_a_copy_a_file_is_written_at_once(single_process, tmp_path, monkeypatch):
    engine = Learning()
    saver = CheckpointSaver(tmp_path, engine, keep_last=1, watchdog=Watchdog(0, 0, tmp_path))
    monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    (line,) = saver.begin(**state(1), background=True)
    assert "a copy of model.pt needs 0.0 GB of host memory" in line
    engine.step()
    path = saver.finish()
    assert torch.load(path / "model.pt", weights_only=True)["all"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_copied_is_written_at_once(single_process, tmp_path, monkeypatch):
    """One rank that raised an error in the middle of DeepSpeed's save would leave the others in its
    barrier.
    """
    engine = Learning()
    saver = CheckpointSaver(tmp_path, engine, keep_last=1, watchdog=Watchdog(0, 0, tmp_path))

    def fail(state):
        raise RuntimeError("CUDA error: out of memory\nCompile with")

    monkeypatch.setattr(saving, "host_copy", fail)
    lines = saver.begin(**state(1), background=True)
    assert lines == [
        f"checkpoint.background: {name} cannot be copied to host memory (RuntimeError: CUDA error:"
        " out of memory): training pauses while it is written"
        for name in ("model.pt", "lens.pt")
    ]
    engine.step()
    path = saver.finish()
    assert torch.load(path / "model.pt", weights_only=True)["all"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("pinned", [True, False])
def test_only_pinned_memory_is_there_for_the_next_copy(
    single_process, tmp_path, monkeypatch, pinned
):
    """Copies of CPU tensors, as of an offloaded optimizer, are freed: on a host with GPUs too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = HostBytes(0, 1000) if pinned else HostBytes(1000, 0)
    monkeypatch.setattr(saving, "host_bytes", lambda state: needed)
    saver = CheckpointSaver(
        tmp_path, Engine(), keep_last=1, watchdog=Watchdog(0, 0, tmp_path), ranks_per_host=2
    )
    found = []
    for step, available in enumerate((5100, 4900, 100)):
        monkeypatch.setattr(saving, "available_memory", lambda available=available: available)
        found.append(len(saver.begin(**state(step), background=True)))
        saver.finish()
    assert found == ([0, 0, 0] if pinned else [0, 1, 2])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("full"), KeyError("a bug")]
)
def test_a_write_that_fails_in_the_background_ends_the_save(
    single_process, tmp_path, monkeypatch, error
):
    saver = CheckpointSaver(tmp_path, Engine(), keep_last=1, watchdog=Watchdog(0, 0, tmp_path))
    saver.begin(**state(1), background=True)
    saver.finish()

    def fail(path, state):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", fail)
        saver.begin(**state(2), background=True)
        with pytest.raises(KeyError if isinstance(error, KeyError) else RunStopped):
            saver.finish()
    assert names(tmp_path) == ["step_00000001"]
    assert not list(tmp_path.glob("*partial*"))
    saver.begin(**state(3), background=True)
    assert saver.finish().name == "step_00000003"


def test_older_ones_that_cannot_be_removed_end_the_next_save(single_process, tmp_path, monkeypatch):
    saver = CheckpointSaver(tmp_path, Engine(), keep_last=1, watchdog=Watchdog(0, 0, tmp_path))

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "step_00000001")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "remove_surplus", fail)
        saver.begin(**state(1), background=True)
        assert saver.finish().name == "step_00000001"
        with pytest.raises(RunStopped, match=r"Permission denied \(step_00000001\)"):
            saver.begin(**state(2), background=True)


def test_a_folder_that_another_run_has_taken_gets_no_checkpoint(single_process, tmp_path):
    owners = iter([None, ConfigError("another run uses it")])

    def check_owner():
        if (error := next(owners)) is not None:
            raise error

    watchdog = Watchdog(0, 0, tmp_path)
    saver = CheckpointSaver(
        tmp_path, Engine(), keep_last=1, watchdog=watchdog, check_owner=check_owner
    )
    saver.begin(**state(1), background=True)
    with pytest.raises(ConfigError, match="another run"):
        saver.finish()
    assert not list(tmp_path.iterdir())


def test_no_error_removes_the_folder_before_all_ranks_have_written(
    single_process, tmp_path, monkeypatch
):
    """Removed below a rank that still writes, some of the folder would stay."""
    order = []
    gather = saving.gather
    monkeypatch.setattr(saving, "gather", lambda value: order.append("gather") or gather(value))
    saver = CheckpointSaver(
        tmp_path,
        Engine(),
        keep_last=1,
        watchdog=Watchdog(0, 0, tmp_path),
        check_owner=lambda: order.append("owner"),
    )
    saver.begin(**state(1), background=True)
    order.clear()
    saver.finish()
    assert order[:2] == ["gather", "owner"]


class Lines:
    """Keeps what a reporter would print."""

    error = None

    def __init__(self):
        self.lines = []

    def text(self, lines):
        self.lines += lines

    log = text

    def saved(self, step, line):
        self.text([line])

    def flush(self):
        pass


def save_and_end(saves):
    """Begins a checkpoint and ends as a run does after too many bad steps."""
    with saves.published_at_the_end():
        saves.save_periodically()
        raise RunStopped("sick", ExitCode.UNHEALTHY, on_all_ranks=True)


def test_a_run_that_ends_has_removed_older_ones(single_process, tmp_path, monkeypatch):
    """A thread of its own would go on when another process has taken over the folder."""
    saver = CheckpointSaver(tmp_path, Engine(), keep_last=1, watchdog=Watchdog(0, 0, tmp_path))
    steps, reporter, remove = iter((1, 2)), Lines(), saving.remove_surplus
    monkeypatch.setattr(
        saving, "remove_surplus", lambda *args, **kwargs: (time.sleep(0.3), remove(*args, **kwargs))
    )
    saves = Saves(saver, lambda: state(next(steps)), reporter, lambda phase: None, background=True)
    saves.save_periodically()
    saves.publish()
    with pytest.raises(RunStopped, match="sick"):
        save_and_end(saves)
    assert names(tmp_path) == ["step_00000002"]
    assert len(reporter.lines) == 2


def test_the_end_of_a_run_is_not_hidden_by_a_checkpoint_that_fails(
    single_process, tmp_path, monkeypatch
):
    saver = CheckpointSaver(tmp_path, Engine(), keep_last=1, watchdog=Watchdog(0, 0, tmp_path))
    reporter = Lines()
    saves = Saves(saver, lambda: state(1), reporter, lambda phase: None, background=True)

    def fail(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", fail)
    with pytest.raises(RunStopped, match="sick"):
        save_and_end(saves)
    (line,) = reporter.lines
    assert "No space left on device" in line
    assert not list(tmp_path.iterdir())


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
