"""What a run costs on paper: operations by network, time and memory by plan."""

import pytest

from mc_ds.training.dry_run import parameter_counts
from mc_ds.training.planning.work import shares, work_per_micro_step
from tests.support.factories import mc_config, run_config


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
