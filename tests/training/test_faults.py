"""Faults, each injected into a real two-rank run: how it ends, what it leaves, and that a
restart ends as if nothing had happened.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch

from mc_ds.console.signals import RELAY_WINDOW_S
from mc_ds.storage import damage
from mc_ds.training.checkpoint import list_checkpoints
from mc_ds.training.checkpoint.save import MEMORY_SHARE
from mc_ds.training.guards.exit_codes import ExitCode
from tests.support.fault_ranks import records, start, tiny
from tests.support.runs import assert_equal
from tests.support.tiny_run import TIMED, TIMEOUT_S, write_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs of this module happen, with the undisturbed run `calm` in it."""
    folder = tmp_path_factory.mktemp("faults")
    write_library(folder / "library")
    start(folder, 2, tiny(folder, "calm")).finish()
    return folder


def curve(folder, name):
    """Everything recorded per step that is not a time."""
    return [
        {key: value for key, value in record.items() if not key.endswith(TIMED)}
        for record in records(folder, name)
    ]


def names(folder, name):
    return [path.name for path in list_checkpoints(folder / "runs" / name / "checkpoints")]


def leftovers(folder, name):
    return [
        path.name
        for path in (folder / "runs" / name).rglob("*")
        if any(word in path.name for word in (".tmp", ".new", ".partial"))
    ]


def assert_continues_calmly(folder, config, world_size=2):
    """Started again without a fault, the run ends with the undisturbed curve and two whole
    checkpoints.
    """
    start(folder, world_size, config).finish()
    assert curve(folder, config["name"]) == curve(folder, "calm")
    assert names(folder, config["name"]) == ["step_00000006", "step_00000003"]
    assert not leftovers(folder, config["name"])


def test_a_killed_rank_takes_the_run_down_and_nothing_else(folder):
    config = tiny(folder, "killed")
    ended = start(folder, 2, config, faults={1: ["die", 4]}).wait()
    assert ended[1] == -signal.SIGKILL
    assert ended[0] not in (0, None)
    assert names(folder, "killed") == ["step_00000003"]
    assert_continues_calmly(folder, config)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGUSR1]
)
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(folder, number):
    name = f"stopped-{number.name}"
    config = tiny(folder, name)
    stopped = start(folder, 2, config, faults={1: ["raise_signal", 1, number]})
    assert stopped.wait() == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    assert stopped.text().count(f"stopped by {number.name} after step 2: ") == 1
    assert not stopped.errors()
    assert names(folder, name) == ["step_00000002"], "the first boundary after the signal"
    assert_continues_calmly(folder, config)


def test_a_checkpoint_between_the_intervals_is_exact_too(folder):
    config = tiny(folder, "between")
    assert start(folder, 2, config, faults={0: ["raise_signal", 3, signal.SIGTERM]}).wait() == [
        85,
        85,
    ]
    assert names(folder, "between") == ["step_00000004", "step_00000003"]
    start(folder, 2, config).finish()
    assert curve(folder, "between") == curve(folder, "calm")


@pytest.mark.parametrize(("validation", "saved"), [(0, []), (1, ["step_00000002"])])
def test_a_signal_during_validation_is_answered_after_it(folder, validation, saved):
    """The first validation comes before the first step, with nothing to save."""
    name = f"validating-{validation}"
    config = tiny(folder, name, validation=dict(eval_interval=2, eval_sequences=2))
    fault = ["raise_signal_in", "Validator.run", signal.SIGTERM, validation]
    assert start(folder, 2, config, faults={1: fault}).wait() == [85, 85]
    assert names(folder, name) == saved


def test_a_run_that_is_stopped_before_its_first_step_makes_none(folder):
    config = tiny(folder, "early")
    fault = ["raise_signal_in", "build_engine", signal.SIGUSR1]
    ranks = start(folder, 2, config, faults={1: fault})
    assert ranks.wait() == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    assert "stopped by SIGUSR1 before its first step" in ranks.text(0)
    assert not names(folder, "early")
    assert_continues_calmly(folder, config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_data_is_prepared_is_acknowledged_and_ends_the_ranks(folder, number):
    name = f"preparing-{number.name}"
    ranks = start(
        folder, 2, tiny(folder, name), faults={rank: ["prepare_forever"] for rank in (0, 1)}
    )
    wait_for(lambda: ranks.text().count("prepares") == 2)
    ranks.signal(number)
    assert ranks.wait() == [128 + number, 128 + number]
    said = f"{number.name} received: the run ends during data preparation; nothing was changed"
    assert ranks.text().count(said) == 1
    assert not (folder / "runs" / name).exists()


def test_a_killed_loader_is_named_and_the_run_saved(folder):
    """How many more batches of a dead process arrive is nobody's promise."""
    config = tiny(folder, "unloaded", data=dict(num_workers=1))
    ranks = start(folder, 2, config, faults={1: ["kill_workers", 1]})
    assert ranks.wait() == [ExitCode.LOADER, ExitCode.LOADER]
    assert ranks.text(1).count("warning: a data loader failed: ") == 1
    (line,) = ranks.errors()
    assert line.startswith("error: rank 1: stopped by a failed data loader (")
    assert f"{names(folder, 'unloaded')[0]} is complete" in line
    assert_continues_calmly(folder, config)


def test_too_little_shared_memory_is_refused_before_anything_changes(folder):
    config = tiny(folder, "cramped", data=dict(num_workers=2))
    ranks = start(folder, 2, config, faults={1: ["little_shared_memory"]})
    assert ranks.wait() == [ExitCode.CONFIG, ExitCode.CONFIG]
    (line,) = ranks.errors()
    assert line.startswith("error: rank 1: data.num_workers = 2: the loaders of 2 ranks on this")
    assert not (folder / "runs/cramped").exists()


def test_bad_steps_that_cannot_be_written_end_all_ranks(folder):
    (folder / "runs/barred").mkdir()
    (folder / "runs/barred/bad_steps").write_text("a file, not a folder")
    ranks = start(folder, 2, tiny(folder, "barred"), faults={1: ["nan_gradients", 4]})
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.startswith("error: the record of a bad step: ")
    assert names(folder, "barred") == ["step_00000003"]


def test_a_second_signal_ends_a_rank_at_once_even_in_a_collective(folder):
    faults = {0: ["tell_phase", 2, "forward"], 1: ["hang", 2]}
    ranks = start(folder, 2, tiny(folder, "impatient"), faults=faults)
    wait_for(lambda: "begins forward" in ranks.text(0))  # for which it needs rank 1
    ranks.signal(signal.SIGTERM, rank=0)
    ranks.processes[0].join(1.5 * RELAY_WINDOW_S)
    assert ranks.processes[0].is_alive()
    while ranks.processes[0].is_alive():  # the first one's window may have begun late
        ranks.signal(signal.SIGTERM, rank=0)
        ranks.processes[0].join(RELAY_WINDOW_S)
    assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    ranks.kill()


def test_a_hang_is_an_error_that_names_rank_step_and_phase(folder):
    """Each rank's watchdog is made impatient where the other one's fault shows, rank 1's when
    rank 0 has said all.
    """
    config = tiny(folder, "hung", health=dict(watchdog_timeout_s=1000))
    released = folder / "rank_0_has_ended"
    ranks = start(
        folder, 2, config, faults={0: ["lose_patience", 4], 1: ["hang", 4, str(released)]}
    )
    ranks.processes[0].join(TIMEOUT_S)
    released.touch()
    assert ranks.wait() == [ExitCode.HANG, ExitCode.HANG]
    assert (
        "error: rank 1 hangs: no progress for 3 s (health.watchdog_timeout_s) in step 4, last phase"
        " 'between steps'" in ranks.text(1)
    )
    assert "error: rank 0 hangs" in ranks.text(0)
    assert "sleep" not in ranks.text(0)
    assert "fault_worker.py" in (folder / "runs/hung/hang-rank1.txt").read_text()
    assert_continues_calmly(folder, config)


def test_a_gradient_that_is_not_a_number_on_one_rank_skips_the_step_on_all(folder):
    ranks = start(folder, 2, tiny(folder, "nan"), faults={1: ["nan_gradients", 2]})
    ranks.finish()
    applied = {record["step"]: record["train/step_applied"] for record in records(folder, "nan")}
    assert applied == {1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0, 5: 1.0, 6: 1.0}
    assert {
        record["step"]: record["mc/lens_step_applied"] for record in records(folder, "nan")
    } == applied
    bad = json.loads((folder / "runs/nan/bad_steps/step_00000002.json").read_text())
    ids = sorted(
        number
        for rank in bad["ranks"]
        for micro in rank["micro_steps"]
        for number in micro["sample_ids"]
    )
    assert ids == [8, 9, 10, 11]  # of four sequences a step, the third four
    assert bad["ranks"][1]["metrics"]["train/grad_norm"] in ("nan", "inf", -1.0)
    assert [path.name for path in (folder / "runs/nan/bad_steps").iterdir()] == [
        "step_00000002.json"
    ]


def test_too_many_bad_steps_in_a_row_stop_the_run(folder):
    config = tiny(folder, "sick", health=dict(max_bad_steps=2))
    ranks = start(folder, 2, config, faults={1: ["nan_gradients", 1, 3, 4]})
    assert ranks.wait() == [ExitCode.UNHEALTHY, ExitCode.UNHEALTHY]
    (line,) = ranks.errors()
    assert (
        "2 consecutive steps had a non-finite loss or gradient (health.max_bad_steps), the last"
        " was step 4" in line
    )
    assert names(folder, "sick") == ["step_00000003"]


def test_bad_steps_in_a_row_are_counted_across_a_restart(folder):
    config = tiny(folder, "relapsed", health=dict(max_bad_steps=2))
    start(folder, 2, config, faults={0: ["die", 3], 1: ["nan_gradients", 2]}).wait()
    assert names(folder, "relapsed") == ["step_00000003"]
    ranks = start(folder, 2, config, faults={1: ["nan_gradients", 3]})
    assert ranks.wait() == [ExitCode.UNHEALTHY, ExitCode.UNHEALTHY]
    (line,) = ranks.errors()
    assert (
        "2 consecutive steps had a non-finite loss or gradient (health.max_bad_steps), the last"
        " was step 3" in line
    )


def test_a_rank_with_another_config_is_one_error(folder):
    ranks = start(folder, 2, tiny(folder, "other"), overrides={1: ["--train.learning_rate=0.5"]})
    assert ranks.wait() == [ExitCode.CONFIG, ExitCode.CONFIG]
    (line,) = ranks.errors()
    assert line.startswith(
        "error: rank 1: train.learning_rate = 0.5 here, 0.002 on rank 0: start all ranks with the"
        " same settings"
    )
    assert not (folder / "runs/other").exists()


def test_debug_mode_finds_a_rank_that_draws_other_variants(folder):
    ranks = start(folder, 2, tiny(folder, "split", debug=True), faults={1: ["other_plans", 2]})
    assert ranks.wait() == [ExitCode.RANKS_DIFFER, ExitCode.RANKS_DIFFER]
    (line,) = ranks.errors()
    assert (
        "rank 1's samples or variant plans differ from those that rank 0 computes for it (step 2,"
        " micro-step 0)" in line
    )


def test_debug_mode_changes_nothing(folder):
    start(folder, 2, tiny(folder, "debugged", debug=True)).finish()
    assert curve(folder, "debugged") == curve(folder, "calm")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_rank_that_cannot_write_its_shard_stops_all(folder, rank):
    name = f"full-{rank}"
    config = tiny(folder, name)
    ranks = start(
        folder, 2, config, faults={rank: ["full_disk", f"rank_{rank}_mp_rank_00_optim_states", 1]}
    )
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.startswith(
        f"error: rank {rank}: cannot save the checkpoint (older ones are intact): "
    )
    assert "No space left on device" in line
    assert names(folder, name) == ["step_00000003"]
    assert not leftovers(folder, name)
    assert_continues_calmly(folder, config)


IN_BACKGROUND = dict(checkpoint=dict(background=True))


def test_training_goes_on_while_a_checkpoint_is_written(folder):
    """Files of the checkpoint after step 3 are written only once step 5 has begun, on one rank; it
    is published at a later boundary, the last one in the foreground, and both are what a run
    without a background would have written.
    """
    config = tiny(folder, "background", **IN_BACKGROUND)
    ranks = start(folder, 2, config, faults={1: ["write_in_background_from", 4]})
    ranks.finish()
    text = ranks.text(0)
    published = [text.index(f"step_0000000{step} is complete") for step in (3, 6)]
    assert published == sorted(published)
    assert_calm(folder, "background")


def assert_calm(folder, run):
    """The run has the curve and the checkpoints of the undisturbed run."""
    assert curve(folder, run) == curve(folder, "calm")
    assert names(folder, run) == names(folder, "calm")
    assert not leftovers(folder, run)
    for name in names(folder, run):
        ours, calm = (folder / "runs" / each / "checkpoints" / name for each in (run, "calm"))
        assert damage(ours) is None
        for file in calm.glob("*.pt"):
            states = (torch.load(at / file.name, weights_only=False) for at in (ours, calm))
            assert_equal(*states, where=file.name)


def test_the_next_save_waits_until_every_rank_has_written(folder):
    """Rank 1 writes its files of the checkpoint after step 3 only when the last one is due."""
    config = tiny(folder, "background-slow", **IN_BACKGROUND)
    faults = {1: ["write_in_background_when_waited_for", 5]}
    start(folder, 2, config, faults=faults).finish()
    assert_calm(folder, "background-slow")


def test_a_checkpoint_is_published_at_the_first_boundary_after_all_have_written(folder):
    config = tiny(folder, "background-prompt", **IN_BACKGROUND)
    faults = {0: ["finish_writing", 4], 1: ["finish_writing", 4, 5]}
    ended = start(folder, 2, config, faults=faults).wait()
    assert ended[1] == -signal.SIGKILL
    assert names(folder, "background-prompt") == ["step_00000003"]
    assert_continues_calmly(folder, config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_in_the_background_ends_all_ranks_in_one_line(folder, rank):
    name = f"background-full-{rank}"
    config = tiny(folder, name, **IN_BACKGROUND)
    ranks = start(
        folder, 2, config, faults={rank: ["full_disk", f"rank_{rank}_mp_rank_00_optim_states"]}
    )
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.startswith(f"error: rank {rank}: cannot save the checkpoint")
    assert "No space left on device" in line
    assert not names(folder, name)
    assert not leftovers(folder, name)
    assert_continues_calmly(folder, config)


def test_a_run_that_stops_publishes_what_it_was_writing_first(folder):
    """The signal comes while rank 0 has not written the checkpoint after step 3."""
    config = tiny(folder, "background-stopped", **IN_BACKGROUND)
    faults = {
        0: ["write_in_background_when_waited_for", 3],
        1: ["raise_signal", 3, signal.SIGTERM],
    }
    ranks = start(folder, 2, config, faults=faults)
    assert ranks.wait() == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    assert names(folder, "background-stopped") == ["step_00000004", "step_00000003"]
    start(folder, 2, config).finish()
    assert curve(folder, "background-stopped") == curve(folder, "calm")


def test_a_run_that_stops_with_an_error_publishes_what_it_was_writing_first(folder):
    """Rank 0 begins to write after the last boundary before the second bad step."""
    config = tiny(folder, "background-sick", health=dict(max_bad_steps=2), **IN_BACKGROUND)
    faults = {0: ["write_in_background_from", 4], 1: ["nan_gradients", 3, 4]}
    ranks = start(folder, 2, config, faults=faults)
    assert ranks.wait() == [ExitCode.UNHEALTHY, ExitCode.UNHEALTHY]
    assert names(folder, "background-sick") == ["step_00000003"]
    assert not leftovers(folder, "background-sick")


def test_a_rank_without_memory_for_copies_writes_at_once(folder):
    """It may use half of the host's, which it shares with rank 0: too little for its files."""
    calm = folder / "runs/calm/checkpoints/step_00000003"
    files = sum(path.stat().st_size for path in calm.glob("*_rank_1_*"))
    config = tiny(folder, "background-tight", **IN_BACKGROUND)
    ranks = start(folder, 2, config, faults={1: ["little_memory", int(1.5 * files / MEMORY_SHARE)]})
    ranks.finish()
    line = (
        "rank 1: checkpoint.background: a copy of zero_pp_rank_1_mp_rank_00_optim_states.pt needs"
    )
    assert ranks.text(0).count(line) == 1
    assert_calm(folder, "background-tight")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size in KiB; unmounted at the end."""
    mounted = []

    def mount(kib):
        place = tmp_path / "small"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def checkpoint_kib(folder):
    checkpoint = folder / "runs/calm/checkpoints/step_00000003"
    return sum(path.stat().st_size for path in checkpoint.iterdir()) / 1024


def test_a_full_disk_stops_the_run_in_one_line_and_destroys_nothing(folder, small_disk):
    disk = small_disk(int(1.5 * checkpoint_kib(folder)))
    config = {**tiny(folder, "disk"), "out_dir": str(disk)}
    ranks = start(folder, 2, config)
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert "cannot save the checkpoint" in line
    assert [path.name for path in list_checkpoints(disk / "disk/checkpoints")] == ["step_00000003"]
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    start(folder, 2, config).finish()
    (folder / "runs/disk").mkdir()
    shutil.copy(disk / "disk/metrics.jsonl", folder / "runs/disk")
    assert curve(folder, "disk") == curve(folder, "calm")


def test_a_record_that_cannot_be_written_stops_all_ranks(folder):
    config = tiny(folder, "mute")
    ranks = start(folder, 2, config, faults={0: ["mute_record", 2]})
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.startswith("error: rank 0: cannot write ")
    assert "metrics.jsonl: No space left on device" in line
    assert_continues_calmly(folder, config)


def test_a_run_folder_that_cannot_be_made_is_one_line(folder):
    (folder / "occupied").write_text("a file, not a folder")
    ranks = start(folder, 2, {**tiny(folder, "nowhere"), "out_dir": str(folder / "occupied")})
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert line.startswith("error: the run folder: ")
    assert "occupied" in line
    assert "Not a directory" in line


def test_a_read_only_run_folder_is_one_line(folder, small_disk):
    disk = small_disk(1024)
    (disk / "frozen").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ranks = start(folder, 2, {**tiny(folder, "frozen"), "out_dir": str(disk)})
    assert ranks.wait() == [ExitCode.STORAGE, ExitCode.STORAGE]
    (line,) = ranks.errors()
    assert "Read-only file system" in line


def damaged(folder, name, change):
    """A copy of the undisturbed run whose newest checkpoint has been damaged; the older one is
    whole.
    """
    shutil.copytree(folder / "runs/calm", folder / "runs" / name)
    change(folder / "runs" / name / "checkpoints")
    return tiny(folder, name)


def truncate_a_shard(checkpoints):
    shard = checkpoints / "step_00000006/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(shard, shard.stat().st_size // 2)


def flip_a_byte(checkpoints):
    shard = checkpoints / "step_00000006/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def lose_a_shard(checkpoints):
    (checkpoints / "step_00000006/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncate_a_shard, "zero_pp_rank_1_mp_rank_00_optim_states.pt has "),
        (
            flip_a_byte,
            "zero_pp_rank_0_mp_rank_00_optim_states.pt does not have the SHA-256 of the manifest",
        ),
        pytest.param(
            lose_a_shard,
            "zero_pp_rank_1_mp_rank_00_model_states.pt is missing",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(folder, change, said):
    config = damaged(folder, change.__name__, change)
    ranks = start(folder, 2, config)
    ranks.finish()
    assert f"step_00000006 is damaged: {said}" in ranks.text(0)
    assert "resumes after step 3 from" in ranks.text(0)
    assert curve(folder, config["name"]) == curve(folder, "calm")
    assert names(folder, config["name"]) == ["step_00000006", "step_00000003"]


def test_an_empty_latest_is_of_no_consequence(folder):
    config = damaged(folder, "unnamed", lambda checkpoints: (checkpoints / "latest").write_text(""))
    config["train"]["total_steps"] = 7
    ranks = start(folder, 2, config)
    ranks.finish()
    assert "resumes after step 6 from" in ranks.text(0)
    assert (folder / "runs/unnamed/checkpoints/latest").read_text() == "step_00000007\n"


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if condition():
                return
        except (OSError, ValueError):  # not there, or half written
            pass
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_signal_to_the_whole_process_tree_leaves_the_loaders_at_work(folder):
    """Launchers and clusters signal every process; a run that loses its loaders could not finish
    its step.
    """
    config = tiny(folder, "tree", data=dict(num_workers=1))
    ranks = start(folder, 2, config, faults={rank: ["wait_for_signal", 2] for rank in (0, 1)})
    wait_for(lambda: records(folder, "tree"))
    tree = [
        child
        for process in ranks.processes
        for child in psutil.Process(process.pid).children(recursive=True)
    ]
    assert len(tree) >= 2
    for process in tree:
        process.terminate()
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [ExitCode.REQUEUE, ExitCode.REQUEUE], ranks.text()
    assert ranks.text().count("SIGTERM received: the run stops at the next step boundary") == 1
    start(folder, 2, config).finish()
    assert curve(folder, "tree") == curve(folder, "calm")


def test_data_that_cannot_be_read_is_one_line(folder):
    cache = shutil.copytree(folder / "cache", folder / "cache_damaged")
    (shard,) = cache.glob("*/train/tokens-00000.bin")
    os.truncate(shard, 100)
    ranks = start(folder, 1, tiny(folder, "unread", data=dict(cache_dir=str(cache))))
    assert ranks.wait() == [ExitCode.CONFIG]
    (line,) = ranks.errors()
    assert line.startswith("error: the data cannot be used: damaged token shard ")
    assert "tokens-00000.bin: it has 100 bytes" in line
