"""Checkpoints as files: what is kept, and which one is continued from."""

import json

import pytest

from mc_ds.config import ConfigError
from mc_ds.storage import StagedFolder, write_manifest, write_text
from mc_ds.training.checkpoint import checkpoint_name, find_checkpoint, list_checkpoints
from mc_ds.weights.checkpoint.folder import publish, remove_surplus
from mc_ds.weights.compatibility import require_match

TOKEN = "0123456789abcdef"


def make(folder, step, *, manifest=True):
    """A checkpoint of two small files."""
    checkpoint = folder / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    files = {
        name: write_text(checkpoint / name, f"{name} of step {step}") for name in ("a.pt", "b.pt")
    }
    if manifest:
        write_manifest(checkpoint, files)
    return checkpoint


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step, manifest=step != 8)
    flip(tmp_path / "step_00000006" / "a.pt")
    make(tmp_path / "elsewhere", 10).rename(tmp_path / f"step_00000010.partial-{TOKEN}")
    (tmp_path / "latest").write_text("step_00000006")
    said = []
    assert find_checkpoint("auto", tmp_path, said.append) == tmp_path / "step_00000004"
    (line,) = said
    assert line.startswith(
        f"checkpoint {tmp_path}/step_00000008 is damaged: no readable manifest.json"
    )
    assert line.endswith(
        f"; checkpoint {tmp_path}/step_00000006 is damaged: a.pt does not have the SHA-256 of the "
        "manifest: using step_00000004, the newest whole one"
    )
    assert find_checkpoint("never", tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "nothing") is None


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        make(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100000000", "step_99999999"]


def test_a_path_may_be_a_checkpoint_a_folder_of_them_or_a_run(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    make(checkpoints, 2)
    newest = make(checkpoints, 4)
    assert (
        find_checkpoint(str(checkpoints / "step_00000002"), tmp_path)
        == checkpoints / "step_00000002"
    )
    assert (
        find_checkpoint(str(checkpoints), tmp_path)
        == find_checkpoint(str(tmp_path / "run"), tmp_path)
        == newest
    )


def test_where_no_checkpoint_is_whole_a_person_decides(tmp_path):
    flip(make(tmp_path, 2) / "a.pt")
    with pytest.raises(
        ConfigError,
        match=(
            r"resume = auto: no checkpoint of .* is whole \(.*\): restore one, or start over with"
            r" resume = never"
        ),
    ):
        find_checkpoint("auto", tmp_path, report=lambda line: None)
    with pytest.raises(ConfigError, match="is neither a checkpoint nor a run with checkpoints"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


def test_what_is_kept(tmp_path):
    for step in (2, 4, 5, 6, 8, 10):
        make(tmp_path, step)
    kept_apart = tmp_path / "step_00000006.partial-of-mine"
    for name in (
        f"step_00000007.partial-{TOKEN}",
        "step_00000006.universal",
        f"step_00000006.replaced-{TOKEN}",
        kept_apart.name,
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000005" / "a.pt").unlink()
    remove_surplus(tmp_path / "step_00000008", keep_last=2, keep_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000004",
        "step_00000006",
        kept_apart.name,
        "step_00000008",
    ]


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path):
    make(tmp_path, 4, manifest=False)
    with StagedFolder(tmp_path / "step_00000004", lock=False) as staged:
        write_manifest(staged.path, {"a.pt": write_text(staged.path / "a.pt", "new")})
        publish(staged)
    assert (tmp_path / "step_00000004" / "a.pt").read_text() == "new"
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_a_checkpoint_of_another_config_is_one_line_that_names_the_fields():
    theirs = json.loads('{"backbone.dim": 64, "mc.seq_len": 128, "seed": 0}')
    require_match("runs/a", theirs, dict(theirs))
    with pytest.raises(ConfigError) as error:
        require_match("runs/a", theirs, {**theirs, "backbone.dim": 32, "mc.seq_len": 64})
    assert (
        str(error.value)
        == "runs/a has another config: backbone.dim = 64 there, 32 here; mc.seq_len = 128 there,"
        " 64 here: use the same, or another run name, or resume = never"
    )
