"""Starting the same command again, starting over, and starts that are refused: what a run's
folder holds afterwards.

A restart is exact: it takes up the run's own last checkpoint, whatever `--resume` said the first
time. Nothing that a run has saved or recorded is removed by a start, and a refused start changes
nothing.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from mc_ds.training.checkpoint import list_checkpoints
from mc_ds.training.checkpoint.archive import archive
from mc_ds.weights.open import open_weights
from tests.support.fault_ranks import records, start, tiny
from tests.support.processes import ROOT
from tests.support.tiny_run import write_library

WORDS = dict(source="files", root=str(ROOT / "mc_ds"), patterns=["*.py"], vocab_size=1000)
"""Text whose words can serve as keys."""
RECALL = dict(
    WORDS, tasks={"recall": 1.0}, recall=dict(facts_by_stage=[4, 6], questions=1, value_tokens=2)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run `base` of six steps on one rank, with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("restart")
    write_library(folder / "library")
    start(folder, 1, recipe(folder, "base")).finish()
    return folder


def recipe(folder, name, stage=3, **changes):
    return tiny(
        folder,
        name,
        stage,
        **{"checkpoint": dict(interval=2, keep_last=3), "data": WORDS, **changes},
    )


def interrupted(folder, config, at):
    """Starts a run that TERM stops in step `at`; the step that it has saved at last, and what it
    has printed.
    """
    ranks = start(folder, 1, config, faults={0: ["raise_signal", at, 15]})
    assert ranks.wait() == [85], ranks.text()
    return steps(folder, config["name"])[-1], ranks.text()


def copy(folder, name, source="base"):
    """A run of its own with what `source` has left."""
    return Path(shutil.copytree(folder / "runs" / source, folder / "runs" / name))


def steps(folder, name):
    """Steps of a run's checkpoints, oldest first."""
    return [
        int(path.name[-8:])
        for path in reversed(list_checkpoints(folder / "runs" / name / "checkpoints"))
    ]


def recorded(folder, name):
    return [record["step"] for record in records(folder, name)]


def losses(folder, name):
    return {record["step"]: record["train/loss"] for record in records(folder, name)}


def contents(run):
    """Everything in a run's folder, byte for byte."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# The same command again


def test_a_path_counts_for_the_first_start_alone(folder):
    """A job that is requeued gets the same command: it must not lose what its first attempt has
    done.
    """
    config = recipe(folder, "from_path", resume=str(folder / "runs/base/checkpoints/step_00000002"))
    last, _ = interrupted(folder, config, 2)
    ranks = start(folder, 1, config)
    ranks.finish()
    assert f"resumes after step {last} from {folder / 'runs/from_path'}" in ranks.text()
    assert "applied to this run's first start only" in ranks.text()
    assert {last, 6} <= set(steps(folder, "from_path"))
    assert recorded(folder, "from_path") == [3, 4, 5, 6]
    assert losses(folder, "from_path") == {
        step: loss for step, loss in losses(folder, "base").items() if step > 2
    }


def test_never_counts_for_the_first_start_alone(folder):
    copy(folder, "never")
    config = recipe(folder, "never", resume="never", seed=1)
    last, said = interrupted(folder, config, 3)
    earlier = folder / "runs" / "never" / "before_1"
    assert f"earlier checkpoints, metrics and config were moved to {earlier}" in said
    ranks = start(folder, 1, config)
    ranks.finish()
    assert f"resumes after step {last} from" in ranks.text()
    assert recorded(folder, "never") == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (folder / "runs/never").glob("before_*")] == ["before_1"]
    changed = recipe(folder, "never", resume="never", seed=2)
    start(folder, 1, changed).finish()  # another command: it does start over
    assert losses(folder, "never") != losses(folder, "never/before_2")
    assert recorded(folder, "never") == recorded(folder, "never/before_2") == [1, 2, 3, 4, 5, 6]


# Starting over


def test_what_a_new_start_sets_aside_is_a_whole_run(folder, monkeypatch):
    """Checkpoints, record, config and tokenizer: it can be evaluated, exported and resumed from."""
    before = copy(folder, "over")
    (before / "bad_steps").mkdir()
    (before / "bad_steps" / "step_00000003.json").write_text("{}")
    (before / "notes.txt").write_text("mine")
    whole = contents(before)
    start(folder, 1, recipe(folder, "over", resume="never", train=dict(total_steps=3))).finish()
    kept = contents(before / "before_1")
    mine = Path("notes.txt")
    assert kept == {name: content for name, content in whole.items() if name != mine}
    assert contents(before)[mine] == b"mine"
    assert recorded(folder, "over") == [1, 2, 3]
    config = recipe(
        folder, "back", resume=str(before / "before_1" / "checkpoints"), train=dict(total_steps=7)
    )
    start(folder, 1, config).finish()
    assert recorded(folder, "back") == [7]


def test_going_back_to_an_own_checkpoint_keeps_the_later_ones(folder):
    run = copy(folder, "rewound")
    later = {
        name: content
        for name, content in contents(run).items()
        if name.parts[:2] in (("checkpoints", "step_00000004"), ("checkpoints", "step_00000006"))
    }
    config = recipe(folder, "rewound", resume=str(run / "checkpoints" / "step_00000002"))
    last, _ = interrupted(folder, config, 2)
    kept = contents(run / "before_1")
    assert {name: kept[name] for name in later} == later
    assert kept[Path("metrics.jsonl")] == (folder / "runs/base/metrics.jsonl").read_bytes()
    assert recorded(folder, "rewound") == list(range(1, last + 1))
    start(folder, 1, config).finish()
    assert steps(folder, "rewound")[-1] == 6
    assert losses(folder, "rewound") == losses(folder, "base")
    assert [path.name for path in run.glob("before_*")] == ["before_1"]


# Refused starts


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_refused_start_changes_nothing(folder, resume):
    """By what is known before the ranks meet, and by what the checkpoint says."""
    name = f"refused_{resume}"
    before = contents(copy(folder, name))
    changes = dict(data=dict(RECALL, num_workers=2), curriculum=dict(delay_steps=1), resume=resume)
    ranks = start(folder, 1, recipe(folder, name, **changes))
    assert ranks.wait() == [2]
    (line,) = ranks.errors()
    assert "curriculum.delay_steps = 1 must exceed" in line
    assert contents(folder / "runs" / name) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(data=RECALL),
            "data.tasks = [['corpus', 1.0]] there, [['recall', 1.0]] here",
        ),
        (dict(mc=dict(horizon_tokens=5)), "mc.horizon_tokens = 6 there, 5 here"),
        (
            dict(mc=dict(lens_layers=2, lens_ask_reach="open")),
            "mc.lens_ask_reach = 'tail' there, 'open' here",
        ),
    ],
)
def test_other_data_or_another_lensnet_is_another_run(folder, changes, said):
    name = f"other_{len(said)}"
    before = contents(copy(folder, name))
    ranks = start(folder, 1, recipe(folder, name, **changes))
    assert ranks.wait() == [2]
    (line,) = ranks.errors()
    assert said in line
    assert contents(folder / "runs" / name) == before


def test_fewer_stages_than_a_run_has_reached_are_refused(folder):
    """LensNet would wait for a last stage that never comes."""
    stages = dict(data=RECALL, mc=dict(lens_start_step="curriculum_end"))
    start(folder, 1, recipe(folder, "staged", **stages)).finish()
    recall = {**RECALL["recall"], "facts_by_stage": [6]}
    for changes, said in (
        (
            dict(data=RECALL | dict(recall=recall)),
            "data.recall.facts_by_stage = [4, 6] there, [6] here",
        ),
        (dict(stages, curriculum=dict(spread=0.3)), "curriculum.spread = 0.4 there, 0.3 here"),
    ):
        ranks = start(folder, 1, recipe(folder, "staged", **{**stages, **changes}))
        assert ranks.wait() == [2]
        (line,) = ranks.errors()
        assert said in line


# What may change


def test_what_may_change_and_did_is_said_at_the_start(folder):
    copy(folder, "changed")
    ranks = start(
        folder, 1, recipe(folder, "changed", train=dict(total_steps=7, learning_rate=1e-3))
    )
    ranks.finish()
    lines = ranks.text().splitlines()
    assert [line for line in lines if "resumes after step 6" in line]
    assert sorted(line.strip() for line in lines if " there, " in line) == [
        "changed: train.learning_rate = 0.002 there, 0.001 here",
        "changed: train.total_steps = 6 there, 7 here",
    ]


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_other_sub_groups_are_converted(folder, stage):
    """`zero3.json` and `zero3_offload.json` cut a rank's weights into groups of other sizes."""
    name = f"groups_{stage}"
    copy(folder, name)
    shutil.rmtree(folder / "runs" / name / "checkpoints" / "step_00000006")
    config = recipe(folder, name, stage)
    changed = json.loads(Path(config["deepspeed_config"]).read_text())
    changed["zero_optimization"]["sub_group_size"] = 5000
    path = folder / f"{name}.json"
    path.write_text(json.dumps(changed))
    ranks = start(folder, 1, {**config, "deepspeed_config": str(path)})
    ranks.finish()
    assert losses(folder, name) == pytest.approx(losses(folder, "base"), rel=1e-5)


# What a checkpoint says of its run


def test_a_checkpoint_can_be_read_from_another_working_directory(folder, tmp_path, monkeypatch):
    """It names its data, its tokenizer and its cache from the root on, whatever the recipe had."""
    near = dict(WORDS, root="mc_ds", cache_dir=os.path.relpath(folder / "cache", ROOT))
    start(folder, 1, recipe(folder, "near", data=near)).finish()
    monkeypatch.chdir(tmp_path)
    opened = open_weights(folder / "runs" / "near")
    data = opened.config.data
    assert (data.root, data.cache_dir) == (str(ROOT / "mc_ds"), str(folder / "cache"))
    assert opened.corpus().cache == folder / "cache"
    assert (tmp_path / ".cache").exists() is False


# Setting aside


def test_a_record_without_a_checkpoint_is_kept_unless_the_run_makes_the_same_again(tmp_path):
    record = tmp_path / "metrics.jsonl"
    assert archive(tmp_path, None, config="mine") is None
    record.write_text("{}\n")
    (tmp_path / "config.yaml").write_text("mine")
    assert archive(tmp_path, None, config="mine") is None
    earlier = archive(tmp_path, None, config="another's")
    assert earlier == tmp_path / "before_1"
    assert (earlier / "metrics.jsonl").read_text() == "{}\n"
    assert not record.exists()


def test_damaged_checkpoints_that_were_passed_over_are_kept(folder):
    run = copy(folder, "damaged")
    newest = run / "checkpoints" / "step_00000006"
    (newest / "lens.pt").write_bytes(b"torn")
    ranks = start(folder, 1, recipe(folder, "damaged"))
    ranks.finish()
    assert "step_00000006 is damaged: lens.pt has 4 bytes" in ranks.text()
    assert "using step_00000004, the newest whole one" in ranks.text()
    assert (run / "before_1/checkpoints/step_00000006/lens.pt").read_bytes() == b"torn"
    assert losses(folder, "damaged") == losses(folder, "base")
