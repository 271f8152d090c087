"""Checkpoints as files: what is proved, what is noticed, what is kept, and which one is continued from."""

import json
import os

import pytest
import torch
from mc_ds.weights.checkpoint.manifest import MANIFEST, damage, is_complete, write_manifest

from mc_ds.config import ConfigError
from mc_ds.storage import FileProof, prove, replace_text, write_tensors, write_text
from mc_ds.training.checkpoint import checkpoint_name, find_checkpoint, list_checkpoints
from mc_ds.training.checkpoint.requirements import require_match, requirements
from mc_ds.weights.checkpoint.folder import publish, remove_surplus, set_aside
from tests.support.factories import mc_config, run_config


def make(folder, step, *, manifest=True):
    """A checkpoint of two small files."""
    checkpoint = folder / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    proofs = {
        name: write_text(checkpoint / name, f"{name} of step {step}") for name in ("a.pt", "b.pt")
    }
    if manifest:
        write_manifest(checkpoint, proofs)
    return checkpoint


def test_what_is_written_is_proved_without_reading_it_again(tmp_path):
    state = {"x": torch.arange(100_000), "y": [1, "two"]}
    proof = write_tensors(tmp_path / "state.pt", state)
    assert (
        proof
        == prove(tmp_path / "state.pt")
        == FileProof((tmp_path / "state.pt").stat().st_size, proof.sha256)
    )
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["x"], state["x"])
    assert loaded["y"] == state["y"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    replace_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(OSError, match="No space"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said", "sizes_tell"),
    [
        (lambda c: os.truncate(c / "b.pt", 5), "b.pt has 5 bytes, the manifest says 14", True),
        (lambda c: flip(c / "a.pt"), "a.pt does not have the SHA-256 of the manifest", False),
        (lambda c: (c / "a.pt").unlink(), "a.pt is missing", True),
        (
            lambda c: (c / MANIFEST).unlink(),
            "no readable manifest.json: No such file or directory",
            True,
        ),
        (lambda c: (c / MANIFEST).write_text(""), "manifest.json is damaged", True),
        (lambda c: (c / MANIFEST).write_text('{"files": [1]}'), "manifest.json is damaged", True),
    ],
)
def test_damage_is_noticed_and_named(tmp_path, harm, said, sizes_tell):
    checkpoint = make(tmp_path, 3)
    assert damage(checkpoint) is None
    assert is_complete(checkpoint)
    harm(checkpoint)
    assert damage(checkpoint).startswith(said)
    assert is_complete(checkpoint) is not sizes_tell


def test_ranks_share_the_reading_and_none_is_left_out(tmp_path):
    checkpoint = make(tmp_path, 3)
    flip(checkpoint / "b.pt")
    found = [damage(checkpoint, share, 3) for share in range(3)]
    assert [problem is None for problem in found] == [True, False, True]


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step, manifest=step != 8)
    flip(tmp_path / "step_00000006" / "a.pt")
    make(tmp_path / "elsewhere", 10).rename(tmp_path / "step_00000010.tmp")
    (tmp_path / "latest").write_text("step_00000006")
    said = []
    assert find_checkpoint("auto", tmp_path, said.append) == tmp_path / "step_00000004"
    assert [line.partition(" is damaged")[0] for line in said] == [
        f"checkpoint {tmp_path}/step_0000000{step}" for step in (8, 6)
    ]
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
        match=r"resume = auto: no checkpoint in .* is whole: restore one, or start over with resume = never",
    ):
        find_checkpoint("auto", tmp_path, report=lambda line: None)
    with pytest.raises(ConfigError, match="is neither a checkpoint nor a run that has one"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


def test_what_is_kept(tmp_path):
    for step in (2, 4, 5, 6, 8, 10):
        make(tmp_path, step)
    for name in ("step_00000007.tmp", "step_00000006.universal", "step_00000006.replaced.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000005" / "a.pt").unlink()
    remove_surplus(tmp_path / "step_00000008", keep_last=2, keep_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000004",
        "step_00000006",
        "step_00000008",
    ]


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path):
    make(tmp_path, 4, manifest=False)
    aside = make(tmp_path / "elsewhere", 4).rename(tmp_path / "step_00000004.tmp")
    publish(aside, tmp_path / "step_00000004")
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_starting_over_moves_earlier_checkpoints_out_of_the_way(tmp_path):
    folder = tmp_path / "checkpoints"
    assert set_aside(folder) is None
    for number in (1, 2):
        make(folder, 4)
        moved = set_aside(folder)
        assert moved == tmp_path / f"checkpoints.before_{number}"
        assert list_checkpoints(moved) == [moved / "step_00000004"]
        assert not folder.exists()


def test_a_checkpoint_of_another_config_is_one_line_that_names_the_fields():
    theirs = json.loads('{"backbone.dim": 64, "mc.seq_len": 128, "seed": 0}')
    require_match("runs/a", theirs, dict(theirs))
    with pytest.raises(ConfigError) as error:
        require_match("runs/a", theirs, {**theirs, "backbone.dim": 32, "mc.seq_len": 64})
    assert str(error.value) == (
        "runs/a is of another config: backbone.dim = 64 there, 32 here; mc.seq_len = 128 there, 64 here: "
        "use the same, or another run name, or resume = never"
    )


def test_a_checkpoint_from_before_a_setting_has_its_first_meaning():
    config = run_config(mc_config())
    mine = requirements(config, device_type="cpu", tokenizer="t", data="d")
    before = {
        name: value
        for name, value in mine.items()
        if name not in ("mc.lens_block_scores", "mc.lens_ask_reach", "train.frozen")
    }
    require_match("runs/a", before, mine)
    with pytest.raises(ConfigError, match=r"mc.lens_block_scores = 'own' there, 'shared' here"):
        require_match("runs/a", before, {**mine, "mc.lens_block_scores": "shared"})
