"""Learning rates against written-out values, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from mc_ds.config import TrainConfig
from mc_ds.model.backbone import LossHead
from mc_ds.model.backbone.decoder import TokenEmbedding
from mc_ds.model.lensnet import LensNet
from mc_ds.training.engine.engine import parameter_groups
from mc_ds.training.schedule import learning_rate, lens_learning_rate
from tests.support.factories import mc_config, model, run_config


def rates(steps, **train):
    config = TrainConfig(learning_rate=1.0, total_steps=12, min_lr_ratio=0.1, **train)
    return [learning_rate(step, config) for step in steps]


def test_warm_up_then_cosine():
    """4 steps up to the peak; at 4, 6, 8, 10 of 12 the cosine is at 0, 1/4, 1/2, 3/4 of its way
    from 1 to 0.1.
    """
    assert rates([0, 1, 2, 3], warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates([4, 6, 8, 10], warmup_steps=4) == pytest.approx(
        [1.0, 0.868198, 0.55, 0.231802], abs=1e-6
    )
    assert rates([12, 99], warmup_steps=4) == pytest.approx([0.1, 0.1])


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert rates([0, 6], warmup_steps=0) == pytest.approx([1.0, 0.55])


def test_wsd_is_constant_then_linear():
    """A quarter of 12 steps decays: from 1 at step 9 towards 0.1 at step 12."""
    assert rates(range(12), warmup_steps=2, schedule="wsd", wsd_decay_ratio=0.25) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4]
    )


def test_lensnet_warms_up_from_its_own_start():
    """Start at 4 of 12 steps, 2 of warm-up: the cosine of the remaining 8 steps is at 0 after 2
    and half-way after 5.
    """
    train = TrainConfig(total_steps=12, min_lr_ratio=0.1, warmup_steps=6)
    mc = mc_config(lens_lr=2.0, lens_start_step=4, lens_warmup_steps=2)
    assert [lens_rate(step, step - 4, mc, train) for step in (4, 5, 6, 9, 12)] == pytest.approx(
        [1.0, 2.0, 2.0, 1.1, 0.2]
    )
    wsd = TrainConfig(
        total_steps=12, min_lr_ratio=0.0, warmup_steps=6, schedule="wsd", wsd_decay_ratio=0.5
    )
    assert [lens_rate(step, step - 4, mc, wsd) for step in (4, 5, 8, 10, 11)] == pytest.approx(
        [1.0, 2.0, 2.0, 1.0, 0.5]
    )


def test_lensnets_warm_up_counts_its_own_steps_and_its_decay_those_of_the_run():
    """It rests but in steps 5, 8 and 9 of 12, where the cosine, which began at step 4, is at
    1/8, 4/8 and 5/8 of its way.
    """
    train = TrainConfig(total_steps=12, min_lr_ratio=0.0, warmup_steps=6)
    mc = mc_config(lens_lr=2.0, lens_start_step=0, lens_warmup_steps=4)
    cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (1 / 8, 4 / 8, 5 / 8)]
    found = [
        lens_rate(step, steps_made, mc, train, start_step=0)
        for steps_made, step in enumerate((5, 8, 9))
    ]
    assert found == pytest.approx(
        [2.0 * share * ramp for share, ramp in zip(cosine, (0.25, 0.5, 0.75), strict=True)]
    )


def lens_rate(step, steps_made, mc, train, start_step=4):
    return lens_learning_rate(step, mc, train, start_step=start_step, steps_made=steps_made)


def matrices(module):
    """Weights of linear maps, of the head and of token embeddings, by identity."""
    kinds = nn.Linear | TokenEmbedding | LossHead
    return {id(part.weight) for part in module.modules() if isinstance(part, kinds)}


@pytest.mark.parametrize(
    "build", ["tied", "untied", "narrow gists", "lensnet", "plain lensnet", "open lensnet"]
)
def test_matrices_decay_and_nothing_else_does(build):
    if "lensnet" in build:
        options = {
            "plain lensnet": dict(lens_index=False, lens_ask="none"),
            "open lensnet": dict(lens_ask_reach="open"),
        }
        module = LensNet(mc_config(**options.get(build, {})), dim=32)
    else:
        module = model(
            run_config(
                mc_config(gist_dim=16 if build == "narrow gists" else None),
                dict(tie_embeddings=build != "untied"),
            )
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    grouped = [
        (id(parameter), group["weight_decay"])
        for group in parameter_groups(module, 0.25)
        for parameter in group["params"]
    ]
    assert sorted(key for key, _ in grouped) == sorted(names)  # every parameter once
    assert {names[key] for key, decay in grouped if decay == 0.25} == {
        names[key] for key in matrices(module)
    }
    assert {decay for _, decay in grouped} == {0.25, 0.0}


def test_a_frozen_parameter_is_in_no_group():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert [
        [tuple(p.shape) for p in group["params"]] for group in parameter_groups(layer, 0.1)
    ] == [[torch.Size([2])]]
