"""What a run costs on paper: operations by network, time and memory by plan."""

from dataclasses import replace

import pytest

from mc_ds.config import RunConfig
from mc_ds.config.cli import load_config
from mc_ds.training.planning.estimate import GIB, largest_shapes, memory_per_rank
from mc_ds.training.planning.hardware import HARDWARE
from mc_ds.training.planning.plan import USABLE, best_plan
from mc_ds.training.planning.report import plan_report
from mc_ds.training.planning.time import StepTime, step_time
from mc_ds.training.planning.work import (
    Work,
    parameter_counts,
    shares,
    work_per_micro_step,
    work_per_sequence,
)
from tests.support.factories import mc_config, run_config
from tools import plan_run


def test_a_plain_model_works_six_times_per_parameter_and_for_attention() -> None:
    config = run_config(mc_config(num_random_variants=0))
    backbone, entries = config.backbone, config.train.micro_batch_size * 96
    parameters = sum(parameter_counts(config).values())
    expected = entries * (6 * parameters + 6 * backbone.num_layers * 96 * backbone.dim)
    work = work_per_micro_step(config, config.mc.wc_length_at(0))
    assert work.model == pytest.approx(expected)
    assert (work.gistnet, work.lensnet) == (0, 0)


def test_gists_are_made_once_per_sequence_and_scores_once_per_row() -> None:
    one, two = (run_config(mc_config(num_random_variants=variants)) for variants in (2, 3))
    length = one.mc.wc_length_at(0)
    less, more = work_per_micro_step(one, length), work_per_micro_step(two, length)
    assert more.gistnet == less.gistnet > 0
    rows = two.mc.rows_at(length) / one.mc.rows_at(length)
    assert more.lensnet == pytest.approx(less.lensnet * rows)
    assert more.backbone == pytest.approx(less.backbone * rows)
    assert sum(shares(more).values()) == pytest.approx(1)


def shape(name: str, *options: str) -> RunConfig:
    return load_config([f"--config=tools/bench/shapes/{name}.yaml", *options])


MEASURED = [  # docs/experiments/scaling.md, S6 and S7: H200, ZeRO-3; ranks, milliseconds
    ("plain", 1, 263),
    ("plain", 2, 291.5),
    ("megacontext", 1, 299),
    ("megacontext_8b", 2, 2124),
]


@pytest.mark.parametrize(("name", "ranks", "milliseconds"), MEASURED)
def test_measured_steps_are_met_within_five_percent(
    name: str, ranks: int, milliseconds: float
) -> None:
    time = timed(shape(name), stage=3, ranks=ranks)
    assert 1e3 * time.total == pytest.approx(milliseconds, rel=0.05)


def timed(config: RunConfig, *, stage: int, ranks: int = 1, micro_steps: int = 1) -> StepTime:
    return step_time(
        config,
        work_per_sequence(config, largest_shapes(config)["W"]),
        parameter_counts(config),
        HARDWARE["h200"],
        ranks=ranks,
        stage=stage,
        micro_steps=micro_steps,
    )


def test_what_ranks_send_is_what_zero_sends() -> None:
    """ZeRO paper, section 7, with gradients in float32: of P parameters a rank sends 2 bytes per
    gather of the weights and 4 per reduction, less its own share.
    """
    config = run_config(mc_config(num_random_variants=0))
    parameters = sum(parameter_counts(config).values())
    for stage, once in ((1, 2 + 2 * 4), (2, 2 + 4), (3, 2 * 2 + 4)):
        sent = timed(config, stage=stage, ranks=4).sent
        assert sent == pytest.approx(parameters * once * 3 / 4)
        assert timed(config, stage=stage, ranks=1).sent == 0
    again = {stage: timed(config, stage=stage, ranks=4, micro_steps=2).sent for stage in (1, 2, 3)}
    assert again[1] == pytest.approx(parameters * 10 * 3 / 4)
    assert again[2] == pytest.approx(parameters * (2 + 2 * 4) * 3 / 4)
    assert again[3] == pytest.approx(parameters * 2 * 8 * 3 / 4)


def test_the_plan_fits_and_no_other_that_fits_is_faster() -> None:
    config = shape("megacontext_8b", "--train.global_batch_size=64")
    counts = parameter_counts(config)
    plan = best_plan(config, counts, HARDWARE["h200"], 8)
    assert sum(plan.memory.values()) <= USABLE * HARDWARE["h200"].memory_gib * 2**30
    assert plan.micro_steps * plan.config.train.micro_batch_size * 8 == 64
    smaller = best_plan(config, counts, HARDWARE["h100"], 8)
    assert smaller.time.total >= plan.time.total
    assert sum(smaller.memory.values()) < sum(plan.memory.values())


def with_share(config: RunConfig, share: float) -> RunConfig:
    train = config.train.model_copy(update={"activation_checkpointing": share})
    return config.model_copy(update={"train": train})


@pytest.mark.parametrize(
    ("work", "again"),
    [
        (Work(1e15, 0, 0), {0.0: 0, 0.3: 1 / 4, 0.5: 2 / 4, 0.7: 3 / 4, 1.0: 1}),
        (Work(0, 1e15, 0), {0.0: 0, 0.3: 1 / 3, 0.5: 2 / 3, 0.7: 2 / 3, 1.0: 1}),
    ],
    ids=["decoder", "GistNet"],
)
def test_a_recomputed_block_takes_a_third_more_time(work: Work, again: dict[float, float]) -> None:
    """What counts is the share of the blocks that really are recomputed, of four and of three."""
    config = run_config(mc_config(gist_layers=3), backbone=dict(num_layers=4))
    times = {
        share: step_time(
            with_share(config, share), work, {}, HARDWARE["h200"], ranks=1, stage=3, micro_steps=1
        ).networks
        for share in again
    }
    for share, recomputed in again.items():
        assert times[share] == pytest.approx(times[0.0] * (1 + recomputed / 3))


def test_no_more_blocks_are_recomputed_than_memory_requires() -> None:
    config = shape("plain", "--train.global_batch_size=8", "--train.micro_batch_size=1")
    counts, chosen = parameter_counts(config), []
    shares = [0, 1 / 4, 1 / 2, 3 / 4, 1]
    for gib in (7, 8, 9, 10, 11, 141):
        hardware = replace(HARDWARE["h200"], memory_gib=gib)
        plan = best_plan(config, counts, hardware, 8)
        fitting = [
            share
            for share in shares
            if sum(
                memory_per_rank(
                    with_share(config, share), counts, 8, plan.stage, precision="bf16"
                ).values()
            )
            <= USABLE * gib * GIB
        ]
        chosen.append(plan.config.train.activation_checkpointing)
        assert chosen[-1] == min(fitting)
    assert sorted(set(chosen)) == shares


def test_of_equally_fast_plans_the_one_that_recomputes_less_is_chosen() -> None:
    """A quarter of one block is none."""
    config = run_config(mc_config(num_random_variants=0), backbone=dict(num_layers=1))
    plan = best_plan(config, parameter_counts(config), HARDWARE["h200"], 8)
    assert plan.config.train.activation_checkpointing == 0.0


@pytest.mark.parametrize(
    ("gib", "said"), [(141, "checkpointing off"), (9, "checkpointing of 50 % of the blocks")]
)
def test_the_page_says_how_many_blocks_are_recomputed(gib: float, said: str) -> None:
    config = shape("plain", "--train.global_batch_size=8")
    hardware = replace(HARDWARE["h200"], memory_gib=gib)
    assert f"accumulation 1, activation {said}\n" in plan_report(config, hardware, 8)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpus", "0"], "--gpus = 0"),
        (["--gpus", "3", "--train.global_batch_size", "8"], "is not a multiple of 3 GPUs"),
        (["--gpus", "1", "--preset", "70b", "--train.global_batch_size", "1"], "too few"),
        (["--gpus", "1", "--tokens", "nan"], "--tokens = nan"),
        (["--gpus", "8", "--preset", "71b"], "71b"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_run.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_page_says_what_a_budget_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_run.main(["--gpus", "64", "--preset", "8b", "--tokens", "1e9"]) == 0
    page = capsys.readouterr().out
    for said in ("ZeRO-", "communication", "GPU-hours", "1,000,000,000 tokens", "LensNet"):
        assert said in page


def test_a_recipe_keeps_its_vocabulary_and_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "launch/recipes/pretrain/pretrain_124m.yaml"
    assert plan_run.main(["--gpus", "8", "--config", recipe]) == 0
    page = capsys.readouterr().out
    config = load_config([f"--config={recipe}"])
    assert f"\n  {config.train.global_batch_size} sequences of" in page
    total = sum(parameter_counts(config).values()) / 1e9
    assert f"total                {total:.3f} B parameters" in page
    assert plan_run.main(["--gpus", "8", "--config", recipe, "--vocab_size", "128256"]) == 0
    assert f"total                {total:.3f} B parameters" not in capsys.readouterr().out
