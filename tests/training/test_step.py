"""What a step says of its losses, and what an uncompressed step does to LensNet."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mc_ds.data import Batch, MicroStep
from mc_ds.focus.controller import MCController
from mc_ds.geometry import lod1_cover
from mc_ds.metrics import Statistics
from mc_ds.model.lensnet import LensNet
from mc_ds.preference import preference_loss
from mc_ds.training.lens import ReplicatedLens
from mc_ds.training.step import StepRunner, loss_statistics
from tests.support.factories import mc_config, model, plan, run_config, tokens, wake

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


class PlainEngine:
    """A model in the place of DeepSpeed's engine; it never steps."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net, self.optimizer = net, SimpleNamespace(param_groups=[])

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.net(*inputs)

    def gradient_accumulation_steps(self) -> int:
        return 1

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> None:
        return None


def test_the_gains_of_before_full_sight_do_not_count_after_it(single_process: torch.device) -> None:
    schedule = [(0, MC.train_wc_length), (2, MC.seq_len), (3, MC.train_wc_length)]
    stages = [dict(start_step=step, train_wc_length=length) for step, length in schedule]
    config = run_config(mc_config(wc_schedule=stages), total_steps=8)
    torch.manual_seed(0)
    lens = ReplicatedLens(LensNet(config.mc, dim=32), config.mc, config.train)
    controller = MCController(lens.lensnet)
    engine = PlainEngine(model(config))
    runner = StepRunner(config, engine, lens, controller, single_process, None)
    counts = []
    for step in range(4):
        lods, starts = plan(config.mc, 2)
        if not config.mc.varies_at(step):
            lods = torch.zeros(2, MC.seq_len, dtype=lods.dtype)
            starts = torch.arange(MC.seq_len, dtype=starts.dtype).expand(2, -1).contiguous()
        rows = Batch(
            tokens=tokens(config.mc, 2),
            lods=lods,
            starts=starts,
            horizon_mask=torch.ones(2, MC.horizon_tokens),
            sample_ids=torch.arange(2),
            micro_step=MicroStep(step, 0, lods.size(1), 0),
        )
        runner.run(step, iter([rows]), lens_start=0)
        counts.append(float(lens.moments.count))
    first = counts[0]
    decayed = (1 + config.mc.lens_adv_norm_beta) * first
    assert counts == [first, pytest.approx(decayed), 0.0, first]
    assert first > 0


def test_a_step_of_random_blocks_teaches_lensnet_on_the_cover_of_gists(
    single_process: torch.device,
) -> None:
    """The loss is that of LensNet's scores of one gist per block, with the sequences' own words."""
    config = run_config(mc_config(random_blocks=3, max_lod=1, lens_matches="words"))
    mc = config.mc
    torch.manual_seed(0)
    lens = ReplicatedLens(wake(LensNet(mc, dim=32)), mc, config.train)
    net, ids, (lods, starts) = model(config), tokens(mc, 2), plan(mc, 2)
    rows = replace(batch(), tokens=ids, lods=lods, starts=starts)
    with torch.no_grad():
        output = net(*(rows.tokens, lods, starts, rows.horizon_mask))
        cover = (x.expand(2, -1) for x in lod1_cover(mc.geometry))
        scores = lens.lensnet(output.visible_entries, *cover, output.lod0, ids)
    expected = preference_loss(
        scores,
        lods,
        starts,
        output.row_scores,
        rows_per_sequence=mc.rows_per_sequence,
        config=mc,
        state=lens.moments,
    ).metrics["mc/lens_loss"]
    engine, controller = PlainEngine(net), MCController(lens.lensnet)
    runner = StepRunner(config, engine, lens, controller, single_process, None)
    record = runner.run(0, iter([rows]), lens_start=0).statistics.record()
    assert record["mc/lens_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert controller.training_calls == 1
