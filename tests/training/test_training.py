"""Whole training runs: what ranks, ZeRO stages and interruptions must not change, what a skipped
step leaves alone, and what is recorded.

All runs are of the real `Trainer` on a small corpus, several to a process
(tests/support/training_worker.py); the tests read what they left.
"""

import json
import math
import sys

import pytest
import torch
from reporting.glossary import glossary

from mc_ds.config import RunConfig
from mc_ds.data import TokenShards, WindowSampler
from mc_ds.training.schedule import learning_rate, lens_learning_rate
from tests.support.processes import ROOT
from tests.support.report_run import meaning_of
from tests.support.tiny_run import TIMED, Runs, run, settings, trainer_of

STEPS, ACCUMULATION = 6, 4
TURNS = dict(
    wc_period=4,
    wc_schedule=[dict(start_step=0, train_wc_length=64), dict(start_step=2, train_wc_length=40)],
)
"""Two uncompressed steps, two compressed, and again; the checkpoint of step 3 is within a
period.
"""
FULL_SIGHT = [True, True, False, False, True, True]
CURRICULUM = dict(
    mc=dict(lens_start_step="curriculum_end", **TURNS),
    data=dict(
        **dict(
            source="files", root=str(ROOT / "mc_ds"), patterns=["*.py"], vocab_size=1000
        ),  # its words serve as keys
        **dict(
            tasks={"recall": 1.0}, recall=dict(facts_by_stage=[4, 6], questions=1, value_tokens=2)
        ),
    ),
    curriculum=dict(interval=1, start_step=1, delay_steps=1, horizon_loss=99.0),
    train=dict(total_steps=8),
)
"""The data's stage rises at the first look."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every scenario, on one rank and on two."""
    runs = Runs(tmp_path_factory.mktemp("training"))
    first, within_period, before_rise, before_stage = (
        str(runs.folder / "runs" / name / "checkpoints" / f"step_{step:08d}")
        for name, step in (("one", 3), ("turns", 3), ("curriculum", 3), ("stages", 2))
    )
    short = dict(train=dict(total_steps=3))
    stages = [dict(start_step=0, train_wc_length=52), dict(start_step=2, train_wc_length=40)]
    runs.work(
        1,
        [
            runs.scenario("one"),
            runs.scenario("one_zero1", stage=1),
            runs.scenario("wide", train=dict(micro_batch_size=2)),
            runs.scenario("recomputed", train=dict(activation_checkpointing=True)),
            runs.scenario("late", mc=dict(lens_start_step=3)),
            runs.scenario("interrupted", stop_after=5),
            runs.scenario("from_path", resume=first),
            runs.scenario("again", name="late", resume="never", stop_after=5),
            runs.scenario(
                "stages", mc=dict(wc_schedule=stages), checkpoint=dict(interval=2), **short
            ),
            runs.scenario(
                "stages_from_path", mc=dict(wc_schedule=stages), resume=before_stage, **short
            ),
            runs.scenario(
                "plain",
                mc=dict(num_random_variants=0),
                validation=dict(continuations=1),
                **short,
            ),
            runs.scenario("bf16", train=dict(total_steps=3, precision="bf16")),
            runs.scenario("turns", mc=TURNS),
            runs.scenario("turns_from_path", mc=TURNS, resume=within_period),
            runs.scenario("curriculum", checkpoint=dict(keep_every=3), **CURRICULUM),
            runs.scenario("curriculum_from_path", resume=before_rise, **CURRICULUM),
        ],
    )
    runs.work(
        2,
        [
            runs.scenario("two"),
            runs.scenario("two_continuing", validation=dict(continuations=2)),
            runs.scenario("two_zero1", stage=1),
            runs.scenario("two_zero2", stage=2),
            runs.scenario("two_recomputed", train=dict(activation_checkpointing=0.5)),
            runs.scenario("nan", nan=[2, 1, 1]),
            runs.scenario("two_interrupted", stop_after=5),
            runs.scenario("two_resumed", name="two_interrupted"),
            runs.scenario("two_turns", mc=TURNS),
        ],
    )
    return runs


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def equal(a, b):
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


def lens_weights(snapshot):
    return snapshot["lens"]["lensnet"]


def untimed(record):
    return {key: value for key, value in record.items() if not key.endswith(TIMED)}


def by_step(records):
    return {record["step"]: untimed(record) for record in records}


# Ranks and stages


@pytest.mark.parametrize(
    "other",
    ["one_zero1", "wide", "recomputed", "two", "two_zero1", "two_zero2", "two_recomputed"],
)
def test_stages_ranks_and_micro_batches_train_the_same_model(runs, other):
    snapshots = list(zip(runs.snapshots("one"), runs.snapshots(other), strict=True))
    for mine, theirs in snapshots:
        assert distance(mine["weights"], theirs["weights"]) <= 1e-5
        assert distance(lens_weights(mine), lens_weights(theirs)) <= 1e-5
        for moment in ("sum_sq", "count"):
            assert float(theirs["lens"]["moments"][moment]) == pytest.approx(
                float(mine["lens"]["moments"][moment]), rel=1e-3
            )
    first, last = snapshots[0][0], snapshots[-1][0]
    assert (
        distance(first["weights"], last["weights"]) > 1e-3
    )  # all that would be vacuous if nothing had been learned
    assert distance(lens_weights(first), lens_weights(last)) > 1e-4


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("one", "one_zero1"),
        ("one", "wide"),
        ("one", "two"),
        ("one", "two_zero1"),
        ("one", "two_zero2"),
        ("turns", "two_turns"),
    ],
)
def test_stages_ranks_and_micro_batches_report_the_same_metrics(runs, label, other):
    correlations = {
        "mc/preference_corr_mean",
        "mc/preference_corr_max",
        "mc/preference_corr_min",
        "mc/preference_corr_lod_only",
    }
    other_by_nature = {"mc/lensnet_calls", "val/lensnet_calls"}  # of each rank
    other_by_nature |= {
        "val/horizon_loss/lens",
        "val/horizon_loss/blind",
    }  # a focus decision may turn at the last bit of a score
    other_by_nature |= (
        {"mc/preference_corr_lod_only"} if other == "wide" else set()
    )  # takes the means of one micro-batch
    for mine, theirs in zip(runs.records(label), runs.records(other), strict=True):
        mine, theirs = untimed(mine), untimed(theirs)
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - other_by_nature:
            tolerance = 1e-4 if key in correlations else 1e-5  # correlations of scores near zero
            assert theirs[key] == pytest.approx(mine[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("label", ["two", "two_zero1", "nan", "two_resumed", "two_turns"])
def test_all_ranks_hold_the_same_bits(runs, label):
    for mine, theirs in zip(runs.snapshots(label, 0), runs.snapshots(label, 1), strict=True):
        assert equal(mine["weights"], theirs["weights"])
        assert equal(mine["lens"], theirs["lens"])


def test_under_bf16_lensnet_learns_in_float32(runs):
    first, *_, last = runs.snapshots("bf16")
    assert {value.dtype for value in lens_weights(last).values()} == {torch.float32}
    assert {value.dtype for value in last["weights"].values()} == {torch.bfloat16}
    moved = {
        name: float((value - lens_weights(first)[name]).abs().max())
        for name, value in lens_weights(last).items()
    }
    assert 0 < moved["head_down.weight"] < 1e-2  # by steps far below bfloat16's resolution
    assert all(math.isfinite(value) for value in moved.values())


# LensNet beside the engine


def test_lensnet_never_changes_the_backbone(runs):
    with_lens, without = runs.snapshots("one"), runs.snapshots("late")
    for mine, theirs in zip(with_lens, without, strict=True):
        assert equal(mine["weights"], theirs["weights"])
    assert not equal(lens_weights(with_lens[3]), lens_weights(without[3]))
    assert equal(lens_weights(without[0]), lens_weights(without[3]))


@pytest.mark.parametrize(("label", "start"), [("one", 0), ("late", 3)])
def test_one_lensnet_forward_per_micro_step(runs, label, start):
    micro_steps = [(step, micro) for step in range(start, STEPS) for micro in range(ACCUMULATION)]
    assert (
        runs.snapshots(label)[-1]["lens_forwards"] == micro_steps
    )  # of the network itself, validation aside
    if label == "one":  # the run `late` was then started over
        calls = {record["step"]: record["mc/lensnet_calls"] for record in runs.records(label)[1:]}
        assert calls == {step: ACCUMULATION * step for step in range(1, STEPS + 1)}
    two_ranks = [record["mc/lensnet_calls"] for record in runs.records("two")[1:]]
    assert two_ranks == [2 * step for step in range(1, STEPS + 1)]


def test_the_plain_baseline_has_no_lensnet(runs):
    assert all(snapshot["lens"] is None for snapshot in runs.snapshots("plain"))
    assert not any("gistnet" in name for name in runs.snapshots("plain")[0]["weights"])
    records = runs.records("plain")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(record.get("mc/lensnet_calls", 0) == 0 for record in records)
    assert records[-1]["val/loss"] == records[-1]["val/loss_baseline"]
    assert records[-1]["train/entries_per_s"] == pytest.approx(records[-1]["train/tokens_per_s"])
    assert not any(key.startswith(("mc/lens_", "mc/preference")) for key in records[-1])


def test_gain_moments_decay_and_restart_with_the_working_context_length(runs):
    counts = [float(snapshot["lens"]["moments"]["count"]) for snapshot in runs.snapshots("stages")]
    moves = [snapshot["lens"]["moments"] for snapshot in runs.snapshots("one")]
    per_step = counts[1]
    assert counts == [0, per_step, pytest.approx(1.99 * per_step), per_step]
    assert float(moves[2]["count"]) == pytest.approx(1.99 * per_step)
    assert [record["mc/wc_length"] for record in runs.records("stages")[1:]] == [52, 52, 40]


def test_a_step_that_is_not_finite_is_skipped_by_all(runs):
    """The loss of one micro-step of one of two ranks is not a number."""
    before, after, following = runs.snapshots("nan")[2:5]
    assert equal(before["weights"], after["weights"])
    assert equal(before["lens"], after["lens"])  # weights, optimizer and moments
    assert not equal(after["weights"], following["weights"])
    assert not equal(lens_weights(after), lens_weights(following))
    assert not equal(after["lens"]["moments"], following["lens"]["moments"])
    assert all(
        bool(value.isfinite().all()) for value in runs.snapshots("nan")[-1]["weights"].values()
    )
    applied = [
        (record["train/step_applied"], record["mc/lens_step_applied"])
        for record in runs.records("nan")[1:]
    ]
    assert applied == [(0, 0) if step == 3 else (1, 1) for step in range(1, STEPS + 1)]


# Uncompressed steps


def test_in_full_sight_there_is_one_row_and_lensnet_rests(runs):
    records, snapshots = runs.records("turns")[1:], runs.snapshots("turns")
    assert [record["mc/wc_length"] for record in records] == [64, 64, 40, 40, 64, 64]
    assert [record["mc/lensnet_calls"] for record in records] == [0, 0, 4, 8, 8, 8]
    assert snapshots[-1]["lens_forwards"] == [
        (step, micro) for step in (2, 3) for micro in range(ACCUMULATION)
    ]
    of_variants = {
        "mc/lens_",
        "mc/preference_",
        "mc/policy_",
        "mc/adv_delta_",
        "mc/horizon_spread",
        "mc/variants_total",
        "mc/lod_count/",
    }
    for record, full in zip(records, FULL_SIGHT, strict=True):
        assert {
            prefix for prefix in of_variants if any(key.startswith(prefix) for key in record)
        } == (set() if full else of_variants)
        assert record["train/entries_per_s"] / record["train/tokens_per_s"] == pytest.approx(
            1 if full else 4 * 40 / 64
        )
    config = RunConfig.model_validate(settings(runs.folder, "turns", mc=TURNS))
    for steps_made, step in enumerate((2, 3)):  # its warm-up waits for it
        assert records[step]["mc/lens_lr"] == lens_learning_rate(
            step, config.mc, config.train, start_step=0, steps_made=steps_made
        )
    assert records[2]["mc/lens_lr"] == config.mc.lens_lr / 2
    states = [snapshot["lens"] for snapshot in snapshots]
    learnt = [[state[key] for key in ("lensnet", "optimizer", "prepared")] for state in states]
    for step in range(STEPS):  # it is not prepared either before it runs
        assert equal(learnt[step], learnt[step + 1]) is FULL_SIGHT[step]
    counts = [float(state["moments"]["count"]) for state in states]
    assert counts == [0, 0, 0, counts[3], pytest.approx(1.99 * counts[3]), 0, 0]


def test_in_full_sight_the_backbone_learns_as_that_of_the_plain_baseline(runs):
    """The same weights at first, then two steps of the same sequences and learning rates."""
    turns, plain = (
        [snapshot["weights"] for snapshot in runs.snapshots(label)] for label in ("turns", "plain")
    )
    for mine, theirs in zip(turns[:3], plain[:3], strict=True):
        assert distance({name: mine[name] for name in theirs}, theirs) <= 1e-6
    assert distance(plain[0], plain[2]) > 1e-3
    for mine, theirs in zip(runs.records("turns")[1:3], runs.records("plain")[1:3], strict=True):
        assert untimed(mine) == pytest.approx(untimed(theirs), rel=1e-6)


def test_full_sight_on_two_ranks_trains_the_same_model(runs):
    for mine, theirs in zip(runs.snapshots("turns"), runs.snapshots("two_turns"), strict=True):
        assert distance(mine["weights"], theirs["weights"]) <= 1e-5
        assert (
            distance(lens_weights(mine), lens_weights(theirs)) <= 5e-4
        )  # Adam's first steps magnify the rounding of small gradients
    assert distance(lens_weights(runs.snapshots("turns")[2]), lens_weights(mine)) > 1e-3


def test_the_curriculum_does_not_look_at_full_sight_and_lensnet_waits_for_its_end(runs):
    records = runs.records("curriculum")[1:]
    assert [record["train/data_stage"] for record in records] == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        1,
    ], "raised after the third step, a step later"
    assert [record["mc/lensnet_calls"] for record in records] == [0, 0, 0, 0, 0, 0, 4, 8]


# Interruption


def test_two_ranks_resume_as_if_never_interrupted(runs):
    continuous, resumed = runs.snapshots("two"), runs.snapshots("two_resumed")
    assert equal(
        [{**snapshot, "lens_forwards": None} for snapshot in continuous[4:]],
        [{**s, "lens_forwards": None} for s in resumed[1:]],
    )
    assert by_step(runs.records("two_interrupted")) == by_step(runs.records("two"))


def test_a_new_process_resumes_as_if_never_interrupted_and_a_finished_run_rests(runs):
    """The run was abandoned after step 5, with records beyond its only checkpoint, of step 3."""
    recipe = runs.folder / "interrupted.yaml"
    recipe.write_text(json.dumps(settings(runs.folder, "interrupted")))
    command = [sys.executable, "launch/train.py", "--config", recipe, "--resume", "auto"]
    assert len(runs.records("interrupted")) > 4
    assert runs.checkpoints("interrupted") == ["step_00000003"]

    done = run(command, runs.environment)
    assert done.returncode == 0, done.stderr
    assert by_step(runs.records("interrupted")) == by_step(runs.records("one"))
    assert [record["step"] for record in runs.records("interrupted")] == list(range(STEPS + 1))
    assert equal(*(saved(runs, name) for name in ("one", "interrupted")))

    folder = runs.folder / "runs" / "interrupted"
    before = contents(folder)
    said = (folder / "train.log").read_text()
    again = run(command, runs.environment)
    assert again.returncode == 0, again.stderr
    assert contents(folder) == before
    assert (folder / "train.log").read_text().startswith(said)


def contents(folder):
    """Bytes of all files of a run, but for its log, which remembers every start."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "train.log"]
    return {path: path.read_bytes() for path in files}


def saved(runs, name):
    """Weights and both optimizers in the final checkpoint of a run on one rank."""
    checkpoint = runs.folder / "runs" / name / "checkpoints" / "step_00000006"
    engine = torch.load(
        checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False
    )["optimizer_state_dict"]
    optimizer = engine["optimizer_state_dict"]
    lens = torch.load(checkpoint / "lens.pt", weights_only=True)
    return {
        "weights": engine["fp32_flat_groups"],
        "state": optimizer["state"],
        "lens": lens,
        "trainer": trainer_of(checkpoint),
    }


def test_a_path_resumes_that_checkpoint_in_another_run(runs):
    assert [record["step"] for record in runs.records("from_path")] == [4, 5, 6]
    of_one = by_step(runs.records("one"))
    assert by_step(runs.records("from_path")) == {step: of_one[step] for step in (4, 5, 6)}


def test_a_period_goes_on_where_the_checkpoint_was(runs):
    of_turns, records = by_step(runs.records("turns")), by_step(runs.records("turns_from_path"))
    assert records == {step: of_turns[step] for step in (4, 5, 6)}
    last, of_resumed = (runs.snapshots(label)[-1] for label in ("turns", "turns_from_path"))
    assert equal(last["weights"], of_resumed["weights"])
    assert equal(last["lens"], of_resumed["lens"])


def test_gain_moments_restart_where_the_length_changes_at_the_checkpoint(runs):
    records = by_step(runs.records("stages"))
    assert by_step(runs.records("stages_from_path")) == {3: records[3]}
    of_whole, of_resumed = (runs.snapshots(label) for label in ("stages", "stages_from_path"))
    assert equal(of_whole[2]["lens"], of_resumed[0]["lens"])
    assert equal(of_whole[3]["lens"], of_resumed[1]["lens"])


def test_a_curriculum_goes_on_with_the_change_that_was_pending(runs):
    of_whole, records = (
        by_step(runs.records("curriculum")),
        by_step(runs.records("curriculum_from_path")),
    )
    assert records == {step: of_whole[step] for step in range(4, 9)}
    assert [of_whole[step]["train/data_stage"] for step in (3, 4, 5)] == [0, 0, 1]


def test_never_starts_over_and_leaves_no_later_checkpoint(runs):
    """The folder held a finished run of other settings; this one was abandoned after its first
    checkpoint.
    """
    of_one, records = by_step(runs.records("one")), by_step(runs.records("late"))
    assert records == {step: of_one[step] for step in records}
    assert 3 in records
    assert 6 not in records
    assert runs.checkpoints("late") == ["step_00000003"]


# The record


PER_STEP = """
    train/loss train/lr train/grad_norm train/tokens train/tokens_per_s train/entries_per_s train/step_ms train/tflops
    train/data_wait_ms
    mc/lens_forward_ms mc/lens_loss_ms mc/lens_loss mc/adv_delta_mean mc/adv_delta_p95 mc/adv_delta_std mc/preference_agreement
    mc/preference_pair_count mc/policy_score_abs_mean mc/policy_score_std_mean mc/lod_loss/0 mc/lod_loss/1 mc/lod_delta/1 mc/lod_count/0
    mc/lod_count/1 mc/lod_count/2 mc/lod2_share mc/compression_ratio mc/wc_length mc/lensnet_calls mc/variants_total
""".split()
CORRELATIONS = """
    mc/preference_corr_mean mc/preference_corr_max mc/preference_corr_min mc/preference_corr_lod_only mc/lod_loss/2 mc/lod_delta/2
""".split()
VALIDATION = """
    val/loss val/loss_baseline val/lensnet_calls
    val/horizon_loss/recency val/horizon_loss/random val/horizon_loss/lens val/horizon_loss/blind val/horizon_loss/full
""".split()


def test_every_step_has_one_record_with_every_metric(runs):
    records = runs.records("one")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        assert set(PER_STEP) <= record.keys()
        assert all(
            isinstance(value, int | float) and math.isfinite(value) for value in record.values()
        )
    assert all(
        set(CORRELATIONS) <= record.keys() for record in records[2:]
    )  # at first all scores are equal: no variance
    assert {record["step"] for record in records if set(VALIDATION) <= record.keys()} == {0, 3, 6}
    calls = [record["val/lensnet_calls"] for record in records if "val/lensnet_calls" in record]
    assert 0 < calls[0] < calls[1] < calls[2]


def test_the_report_explains_every_key_of_every_record(runs):
    keys = {
        key
        for folder in (runs.folder / "runs").iterdir()
        for record in runs.records(folder.name)
        for key in record
    }
    assert len(keys) > 50
    assert not {key for key in keys if not meaning_of(key, glossary())}


def test_continuations_are_recorded_and_change_nothing(runs):
    """Two ranks under ZeRO-3: not a bit of what they hold after each step."""
    for rank in (0, 1):
        for one, other in zip(
            runs.snapshots("two", rank), runs.snapshots("two_continuing", rank), strict=True
        ):
            assert equal(one, other)
    found = by_step(runs.records("two_continuing"))
    texts = {
        step: {key: record.pop(key) for key in list(record) if "continuation" in key}
        for step, record in found.items()
    }
    keys = {f"val/continuation/{n}/{part}" for n in (0, 1) for part in ("prompt", "model", "text")}
    assert {step for step, text in texts.items() if text} == {0, 3, 6}
    assert all(text.keys() == keys for text in texts.values() if text)
    assert texts[0]["val/continuation/0/text"] == texts[6]["val/continuation/0/text"]
    calls = "val/lensnet_calls"  # LensNet chooses their contexts too
    alone = by_step(runs.records("two"))
    assert found[6].pop(calls) > alone[6].pop(calls)
    assert found[6] == alone[6]
    log = (runs.folder / "runs" / "two_continuing" / "train.log").read_text()
    assert log.count("  the model writes ") == 6
    plain = by_step(runs.records("plain"))
    assert plain[3]["val/continuation/0/model"]


def test_the_records_say_what_was_done(runs):
    config = RunConfig.model_validate(settings(runs.folder, "one"))
    (text,) = (runs.folder / "cache").glob("stdlib-*/train")
    windows = WindowSampler(len(TokenShards(text)), window=65, stride=64, seed=0).windows_per_epoch
    for record in runs.records("one")[1:]:
        step = record["step"] - 1
        assert record["data/epoch/corpus"] == 4 * (step + 1) / windows
        assert record["train/tokens"] == 4 * 64 * (step + 1)
        assert record["train/entries_per_s"] / record["train/tokens_per_s"] == pytest.approx(
            4 * 40 / 64
        )
        assert record["train/lr"] == learning_rate(step, config.train)
        assert record["mc/lens_lr"] == lens_learning_rate(
            step, config.mc, config.train, start_step=0, steps_made=step
        )
        assert record["mc/variants_total"] == 12
        assert sum(
            record[f"mc/lod_count/{level}"] * 4**level for level in range(3)
        ) == pytest.approx(64)
        assert (
            sum(record[f"mc/lod_count/{level}"] for level in range(3))
            == pytest.approx(record["mc/wc_length"])
            == 40
        )
    losses = [record["train/loss"] for record in runs.records("one")[1:]]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert losses[-1] < losses[0] - 0.1
