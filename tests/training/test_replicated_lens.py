"""LensNet's own optimizer: one ratio, clipping, AdamW's first moments, and a warm-up that counts
the steps it made.
"""

import copy
from typing import Any

import pytest
import torch

from mc_ds.metrics import Statistics
from mc_ds.model.lensnet import LensNet
from mc_ds.preference import PreferenceResult
from mc_ds.training import lens as lens_module
from mc_ds.training.lens import ReplicatedLens
from tests.support.factories import mc_config, run_config

BETAS = (0.8, 0.6)
DENOMINATOR = 2.0
pytestmark = pytest.mark.usefixtures("single_process")


def replicated(**mc: Any) -> ReplicatedLens:
    config = run_config(mc_config(**mc), total_steps=40, adam_beta1=BETAS[0], adam_beta2=BETAS[1])
    torch.manual_seed(0)
    return ReplicatedLens(LensNet(config.mc, dim=32), config.mc, config.train)


def take_step(
    lens: ReplicatedLens, step: int, *, apply: bool = True
) -> tuple[list[torch.Tensor], float | None]:
    """A step of a loss whose gradient is noise: that gradient, and what the step returned."""
    generator = torch.Generator().manual_seed(step)
    noise = [torch.randn(parameter.shape, generator=generator) for parameter in lens.parameters]
    lens.start_step()
    numerator = torch.stack(
        [(parameter * part).sum() for parameter, part in zip(lens.parameters, noise, strict=True)]
    ).sum()
    denominator, moments = torch.tensor(DENOMINATOR), torch.tensor([1.0, 2.0], dtype=torch.float64)
    lens.accumulate(PreferenceResult(numerator, denominator, moments, Statistics()))
    lens.reduce()
    return [part / DENOMINATOR for part in noise], lens.finish_step(step, start_step=0, apply=apply)


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def of_optimizer(lens: ReplicatedLens, name: str) -> torch.Tensor:
    return flat([lens.optimizer.state[parameter][name] for parameter in lens.parameters])


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_the_first_moments_are_those_of_the_clipped_gradient(
    monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    monkeypatch.setattr(lens_module, "CLIP_NORM", clip)
    lens = replicated()
    gradient, norm = take_step(lens, 0)
    expected = flat(gradient)
    assert norm == pytest.approx(float(expected.norm())), "the norm before clipping"
    assert norm > 1
    clipped = expected * min(1.0, clip / float(expected.norm()))
    torch.testing.assert_close(
        of_optimizer(lens, "exp_avg"), (1 - BETAS[0]) * clipped, rtol=1e-4, atol=1e-12
    )
    torch.testing.assert_close(
        of_optimizer(lens, "exp_avg_sq"), (1 - BETAS[1]) * clipped.square(), rtol=1e-4, atol=1e-18
    )


def rates(lens: ReplicatedLens, steps: Any) -> list[float]:
    found = []
    for step in steps:
        take_step(lens, step)
        found.append(lens.optimizer.param_groups[0]["lr"])
    return found


def test_the_warm_up_begins_with_its_first_step_and_waits_where_it_makes_none() -> None:
    """It rests until step 10 of 40, at 12 and 13, and skips 14; WSD has not begun to decay."""
    lens = replicated(lens_lr=1.0, lens_warmup_steps=4)
    lens.train = lens.train.model_copy(update={"schedule": "wsd"})
    assert rates(lens, (10, 11)) == pytest.approx([0.25, 0.5])
    assert take_step(lens, 14, apply=False)[1] is None
    assert rates(lens, (15, 16, 17)) == pytest.approx([0.75, 1.0, 1.0])
    assert lens.steps_made == 5


def test_its_state_holds_how_many_steps_it_has_made() -> None:
    lens = replicated(lens_warmup_steps=10)
    rates(lens, (7, 8, 9))
    state = copy.deepcopy(lens.state_dict())
    resumed = replicated(lens_warmup_steps=10)
    resumed.load_state_dict(state)
    assert resumed.steps_made == 3
    assert rates(resumed, (10, 11)) == rates(lens, (10, 11))
    assert torch.equal(flat(resumed.parameters), flat(lens.parameters))
    assert torch.equal(of_optimizer(resumed, "exp_avg_sq"), of_optimizer(lens, "exp_avg_sq"))


def test_a_lensnet_that_has_not_started_has_made_none() -> None:
    state = replicated().state_dict()
    resumed = replicated(lens_lr=1.0, lens_warmup_steps=4)
    resumed.load_state_dict(state)
    assert rates(resumed, (0,)) == pytest.approx([0.25])
