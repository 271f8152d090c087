"""What a step says of its losses."""

import pytest
import torch

from mc_ds.data import Batch, MicroStep
from mc_ds.metrics import Statistics
from mc_ds.training.step import loss_statistics
from tests.support.factories import mc_config, plan

MC = mc_config()


def batch() -> Batch:
    """Two sequences of a baseline and three variants."""
    lods, starts = plan(MC, 2)
    return Batch(
        tokens=torch.zeros(2, MC.seq_len + 1, dtype=torch.int64),
        lods=lods,
        starts=starts,
        horizon_mask=torch.ones(2, MC.horizon_tokens),
        sample_ids=torch.arange(2),
        micro_step=MicroStep(0, 0, MC.train_wc_length, 0),
    )


def test_losses_are_means_over_entries_rows_and_levels() -> None:
    rows = batch()
    nll = torch.rand(rows.lods.shape, generator=torch.Generator().manual_seed(0))
    # The baseline is far off: what focus could win is a matter of the variants alone.
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, -9.0, 2.0, 2.0, 5.0])
    record = Statistics.from_flat(loss_statistics(nll, scores, rows.lods, mc=MC)).record()
    assert record["train/loss"] == pytest.approx(float(nll.mean()))
    assert record["train/horizon_loss"] == pytest.approx(float(scores.mean()))
    for level in range(3):
        assert record[f"mc/lod_loss/{level}"] == pytest.approx(
            float(nll[rows.lods == level].mean())
        )
    spreads = (2 / 3) ** 0.5, 2**0.5
    assert record["mc/horizon_spread"] == pytest.approx(sum(spreads) / 2)
