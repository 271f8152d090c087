"""Resuming real runs: exact on as many ranks under the same ZeRO stage, and continued on others."""

import os
import shutil

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from mc_ds.storage import fingerprint, write_tensors, write_text
from mc_ds.training.checkpoint import list_checkpoints
from mc_ds.training.checkpoint.universal import SOURCE
from tests.support.fault_ranks import records, start, tiny
from tests.support.runs import assert_equal
from tests.support.tiny_run import edit_trainer, trainer_of, write_library

LAST = "step_00000006"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Undisturbed runs: `two`, on two ranks, `one`, and `two_zero1`, of two steps less between
    checkpoints.
    """
    folder = tmp_path_factory.mktemp("resume")
    write_library(folder / "library")
    start(folder, 2, recipe(folder, "two")).finish()
    return folder


def recipe(folder, name, stage=3, **changes):
    return tiny(folder, name, stage, **{"checkpoint": dict(interval=2, keep_last=3), **changes})


def source(folder, world, stage):
    """The name of an undisturbed run, made where it is missing."""
    name = {(2, 3): "two", (1, 3): "one", (2, 1): "two_zero1"}[world, stage]
    if not (folder / "runs" / name).exists():
        start(folder, world, recipe(folder, name, stage)).finish()
    return name


def cut(folder, name, copy, step):
    """A copy of a run as it was when `step` was its last checkpoint."""
    shutil.copytree(folder / "runs" / name, folder / "runs" / copy)
    for checkpoint in list_checkpoints(folder / "runs" / copy / "checkpoints"):
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)


def weights(folder, name):
    """Backbone and GistNet in the last checkpoint, float32, and LensNet."""
    checkpoints = folder / "runs" / name / "checkpoints"
    lens = torch.load(checkpoints / LAST / "lens.pt", weights_only=True)["lensnet"]
    return {
        **get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=LAST),
        **{f"lens.{key}": value for key, value in lens.items()},
    }


def losses(folder, name):
    return {record["step"]: record["train/loss"] for record in records(folder, name)}


def test_continuous_is_resumed_is_resumed_twice(folder):
    """Every file of the last checkpoint: weights, both optimizers, moments, schedule, random
    state, counts.
    """
    cut(folder, "two", "twice", 2)
    start(
        folder,
        2,
        recipe(folder, "twice", train=dict(total_steps=6)),
        faults={0: ["raise_signal", 3, 15]},
    ).wait()
    assert list_checkpoints(folder / "runs/twice/checkpoints")[0].name == "step_00000004"
    start(folder, 2, recipe(folder, "twice")).finish()
    cut(folder, "two", "once", 4)
    start(folder, 2, recipe(folder, "once")).finish()
    straight = folder / "runs/two/checkpoints" / LAST
    for name in ("once", "twice"):
        resumed = folder / "runs" / name / "checkpoints" / LAST
        assert {path.name for path in resumed.iterdir()} == {
            path.name for path in straight.iterdir()
        }
        assert trainer_of(resumed) == trainer_of(straight)
        for path in straight.glob("*.pt"):
            assert_equal(
                torch.load(path, weights_only=False),
                torch.load(resumed / path.name, weights_only=False),
                path.name,
            )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 3), (1, 3)),
        ((1, 3), (2, 3)),
        ((2, 3), (2, 1)),
        ((2, 1), (2, 3)),
        pytest.param((2, 1), (1, 2), marks=pytest.mark.slow),
    ],
    ids=lambda x: f"{x[0]}_ranks_zero{x[1]}",
)
def test_another_number_of_ranks_or_another_stage_continues_the_curve(folder, before, after):
    name = f"resized-{before}-{after}".replace(", ", "_").replace("(", "").replace(")", "")
    cut(folder, source(folder, *before), name, 4)
    ranks = start(folder, after[0], recipe(folder, name, after[1]))
    ranks.finish()
    there, here = (
        f"{world} rank{'s' * (world != 1)} with ZeRO-{stage}" for world, stage in (before, after)
    )
    assert f"converting from {there} to {here}" in ranks.text(0)
    straight, resized = losses(folder, "two"), losses(folder, name)
    assert resized == pytest.approx(straight, rel=1e-5)
    expected = weights(folder, "two")
    for key, value in weights(folder, name).items():
        assert float((value - expected[key]).detach().abs().max()) <= 5e-5, key
    assert not list(
        (folder / "runs" / name / "checkpoints").glob("*.universal*")
    )  # the first save after it needs it no more


def test_a_resized_run_is_resumed_exactly(folder):
    """Settings and step counts of the optimizer's groups survive the conversion: the next
    checkpoint is as good as any.
    """
    cut(folder, "two", "grown", 2)
    start(folder, 1, recipe(folder, "grown"), faults={0: ["raise_signal", 3, 15]}).wait()
    cut(folder, "grown", "regrown", 4)
    start(folder, 2, recipe(folder, "regrown")).finish()
    assert losses(folder, "regrown") == pytest.approx(losses(folder, "two"), rel=1e-5)
    straight, regrown = (
        torch.load(
            folder
            / "runs"
            / name
            / "checkpoints"
            / LAST
            / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            weights_only=False,
        )
        for name in ("two", "regrown")
    )
    groups = [
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in shard["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
        ]
        for shard in (straight, regrown)
    ]
    assert groups[0] == groups[1]
    assert len({group["weight_decay"] for group in groups[0]}) == 2
    for shard in (straight, regrown):
        assert [
            float(state["step"])
            for state in shard["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
        ] == [6.0, 6.0]


def test_a_checkpoint_of_another_shape_is_refused_and_left_alone(folder):
    cut(folder, "two", "wrong", 4)
    before = sorted(path.relative_to(folder) for path in (folder / "runs/wrong").rglob("*"))
    ranks = start(folder, 2, recipe(folder, "wrong", backbone=dict(ffn_dim=64), seed=1))
    assert ranks.wait() == [2, 2]
    (line,) = ranks.errors()
    assert (
        "step_00000004 has another config: backbone.ffn_dim = 48 there, 64 here; seed = 0 there,"
        " 1 here" in line
    )
    assert sorted(path.relative_to(folder) for path in (folder / "runs/wrong").rglob("*")) == before


def test_what_may_change_does_change(folder):
    """The optimizer's settings come from the config, not from the checkpoint."""
    cut(folder, "two", "changed", 4)
    start(
        folder,
        2,
        recipe(
            folder,
            "changed",
            train=dict(weight_decay=0.7, adam_beta2=0.5),
        ),
    ).finish()
    checkpoint = folder / "runs/changed/checkpoints" / LAST
    shard = torch.load(
        checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt", weights_only=False
    )["optimizer_state_dict"]
    groups = shard["optimizer_state_dict"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert {group["betas"] for group in groups} == {(0.9, 0.5)}
    lens = torch.load(checkpoint / "lens.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["betas"] for group in lens} == {(0.9, 0.5)}


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.system, (f"touch {self.sprung}",)


def plant(folder, name, sprung):
    """A copy of the run on two ranks in whose newest checkpoint one rank's file runs a command; its
    manifest is right, as whoever plants such a file can make it.
    """
    cut(folder, "two", name, 4)
    checkpoint = folder / "runs" / name / "checkpoints" / "step_00000004"
    (path,) = checkpoint.glob("*_rank_1_*_optim_states.pt")
    write_tensors(path, torch.load(path, weights_only=False) | {"more": Command(sprung)})
    edit_trainer(checkpoint, lambda trainer: None)
    return checkpoint, path


@pytest.mark.parametrize("world", [2, 1], ids=["as_it_is", "converted"])
def test_a_checkpoint_that_would_run_a_command_is_refused(folder, world):
    name, sprung = f"trap_{world}", folder / f"sprung_{world}"
    checkpoint, path = plant(folder, name, sprung)
    ranks = start(folder, world, recipe(folder, name))
    assert set(ranks.wait()) == {2}, ranks.text()
    assert not sprung.exists()
    (line,) = set(ranks.errors())
    assert f"{checkpoint} could run code: {path} holds posix.system" in line
    assert list_checkpoints(checkpoint.parent)[0] == checkpoint  # nothing has changed
    start(folder, world, recipe(folder, name, checkpoint=dict(trusted=True))).finish()
    assert sprung.exists()  # the test can fail: this is what it would have done


def test_a_conversion_that_would_run_a_command_is_refused(folder):
    """It lies beside the checkpoint, where whoever made the checkpoint can have put it."""
    cut(folder, "two", "planted", 4)
    checkpoint = folder / "runs" / "planted" / "checkpoints" / "step_00000004"
    converted, sprung = checkpoint.with_name("step_00000004.universal"), folder / "sprung_planted"
    (converted / checkpoint.name / "zero").mkdir(parents=True)
    write_text(converted / SOURCE, fingerprint(checkpoint / "manifest.json").sha256 + "\n")
    path = converted / checkpoint.name / "zero" / "optimizer_state.pt"
    torch.save({"more": Command(sprung)}, path)
    ranks = start(folder, 1, recipe(folder, "planted"))
    assert set(ranks.wait()) == {2}, ranks.text()
    assert not sprung.exists()
    assert any(f"could run code: {path} holds posix.system" in line for line in ranks.errors())
