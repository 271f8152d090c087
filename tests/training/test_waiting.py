"""From the arrival of a batch to the optimizers' steps nothing waits for the device."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mc_ds.data import Batch, MicroStep
from mc_ds.focus.controller import MCController
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.training import lens as lens_module
from mc_ds.training.ranks import agreement
from mc_ds.training.step import StepRunner
from tests.support.factories import VOCAB, mc_config, plan, run_config, tokens

CONFIGS = {
    "default": {},
    "entry": dict(
        lens_objective="entry",
        lens_rank_weight=0.1,
        lens_budget_weight=0.1,
        horizon_loss_weight=0.5,
        lens_pair_baseline=True,
    ),
    "plain lens": dict(lens_index=False, lens_ask="none", lens_split_margins=False),
    "what is open": dict(lens_layers=2, lens_ask_reach="open"),
    "one level": dict(max_lod=1, train_wc_length=48),
    "before lens_start_step": dict(lens_start_step=9),
    "no variants": dict(num_random_variants=0, train_wc_length=96),
    "uncompressed": dict(
        wc_schedule=[
            dict(start_step=0, train_wc_length=96),
            dict(start_step=1, train_wc_length=72),
        ],
        train_wc_length=72,
    ),
    "one score per block": dict(lens_block_scores="shared"),
}


class BoundaryReached(Exception):
    """The optimizers may wait for the device; what comes before may not."""


class Engine:
    """The root module as an engine of one rank without DeepSpeed, up to the optimizer's step
    after two micro-steps.
    """

    def __init__(self, model):
        self.model, self.optimizer, self.micro_steps = model, SimpleNamespace(param_groups=[]), 0

    def __call__(self, *inputs):
        return self.model(*inputs)

    def gradient_accumulation_steps(self):
        return 2

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.micro_steps += 1
        if self.micro_steps == 2:
            self.micro_steps = 0
            raise BoundaryReached


class NoCopiesFromTheHost(TorchFunctionMode):
    """Refuses tensors made of Python numbers: on a GPU each is a copy from pageable memory,
    which waits.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), (
            f"{func.__name__} in the step copies from the host"
        )
        return func(*args, **(kwargs or {}))


def step_to_the_boundary(mc, device, monkeypatch):
    """Two micro-steps as the trainer runs them, ready to be called, with batch and modules on
    `device`.
    """
    config = run_config(mc)
    monkeypatch.setattr(lens_module.dist, "broadcast", lambda tensor, src: None)
    lensnet = LensNet(mc, dim=config.backbone.dim).to(device)
    lens = lens_module.ReplicatedLens(lensnet, mc, config.train)
    monkeypatch.setattr(lens, "_reduce", lambda: None)
    if device.type == "meta":
        monkeypatch.setattr(lens_module, "copy_to_host", lambda value: lambda: value)
    model = MegaContextModel(config, vocab_size=VOCAB).to(device)
    runner = StepRunner(config, Engine(model), lens, MCController(lensnet), device, None)
    monkeypatch.setattr(agreement.dist, "all_reduce", lambda tensor, **_: SimpleNamespace(wait=int))
    sent = agreement.StepAgreement(device)
    runner.before_optimizers = lambda: sent.send(agreement.Request.GO_ON, writing=True)
    varied = mc.varies_at(0)
    lods, starts = (
        plan(mc, 2) if varied else (torch.zeros(2, 96).long(), torch.arange(96).expand(2, -1))
    )
    horizon_mask = torch.ones(2, mc.horizon_tokens)
    batch = Batch(
        tokens(mc, 2),
        lods,
        starts,
        horizon_mask,
        torch.arange(2),
        MicroStep(0, 0, mc.train_wc_length, 0),
    ).to(device)
    lens_start = mc.lens_start_step if mc.num_random_variants else None

    def call():
        with pytest.raises(BoundaryReached):
            runner.run(0, iter([batch, batch]), lens_start=lens_start)
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(
            (parameter.grad is not None) == (varied and lens_start == 0)
            for parameter in lens.parameters
        )

    return call


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_step_reads_nothing_and_copies_nothing_from_the_host(options, monkeypatch):
    """On the meta device, where no tensor has a value: reading one, or a shape that depends on
    one, raises.
    """
    call = step_to_the_boundary(mc_config(**options), torch.device("meta"), monkeypatch)
    with NoCopiesFromTheHost():
        call()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_what_would_wait_is_noticed(read):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoCopiesFromTheHost():
        read(torch.empty(4, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_step_never_synchronises_a_gpu(options, monkeypatch):
    call = step_to_the_boundary(mc_config(**options), torch.device("cuda"), monkeypatch)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
