"""A graphed function is the function: values, gradients, hooks; nobody sees its memory change."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mc_ds.model.lensnet import LensNet
from mc_ds.model.recording import CudaRecorder
from mc_ds.preference import GainMoments, PreferenceLoss
from mc_ds.training.engine.graphs import GraphedFunction
from tests.support.factories import mc_config, model, plan, run_config, tokens, wake
from tests.support.replayer import Replayer

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Inner(NamedTuple):
    total: Tensor
    layout: tuple[tuple[str, int], ...]


class Result(NamedTuple):
    loss: Tensor
    detached: Tensor
    inner: Inner
    count: Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor, weight: Tensor) -> Result:
        hidden = self.first(x).tanh()
        y = self.second(hidden).squeeze(-1) * weight
        return Result(y.square().mean(), y.detach(), Inner(y.sum(), (("y", 1),)), (x > 0).sum())


def made(device: str) -> tuple[Net, Net, GraphedFunction, Any]:
    torch.manual_seed(0)
    net, twin = Net().to(device), Net().to(device)
    twin.load_state_dict(net.state_dict())
    recorder = Replayer() if device == "cpu" else CudaRecorder()
    return net, twin, GraphedFunction(net.forward, net, recorder=recorder), recorder


def hold_gradient_nodes(net: nn.Module) -> list[Any]:
    """Have autograd bind each parameter to the present stream, as DeepSpeed's hooks do."""
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in net.parameters()]
    for node in nodes:
        node.register_hook(lambda *_: None)
    return nodes


def batch(device: str, seed: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((rows, 3), (rows,)))
    return x.to(device), weight.to(device).requires_grad_()


def assert_same(found: Result, expected: Result) -> None:
    assert type(found) is Result
    assert found.inner.layout == expected.inner.layout
    for mine, right in zip(
        (*found[:2], found.inner.total, found.count),
        (*expected[:2], expected.inner.total, expected.count),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)
        assert mine.requires_grad == right.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_the_functions_while_weights_and_inputs_change(
    device: str,
) -> None:
    """Two shapes in turn, gradients added up over two calls, a step of the weights in between."""
    net, twin, graphed, _ = made(device)
    nodes = hold_gradient_nodes(net)
    assert len(nodes) == 6
    for step in range(6):
        for micro in range(2):
            x, weight = batch(device, 2 * step + micro, rows=4 + step % 2)
            other = weight.detach().clone().requires_grad_()
            found, expected = graphed(x, weight), twin(x, other)
            assert_same(found, expected)
            (found.loss + 0.5 * found.inner.total).backward()
            (expected.loss + 0.5 * expected.inner.total).backward()
            torch.testing.assert_close(weight.grad, other.grad)
        with torch.no_grad():
            for mine, right in zip(net.parameters(), twin.parameters(), strict=True):
                assert (mine.grad is None) == (right.grad is None)
                if mine.grad is not None:
                    torch.testing.assert_close(mine.grad, right.grad)
                    mine -= 0.1 * mine.grad
                    right -= 0.1 * right.grad
                mine.grad = right.grad = None


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_returned_changes_with_a_later_call(device: str) -> None:
    net, _, graphed, _ = made(device)
    first = graphed(*batch(device, 0))
    first.loss.backward()
    gradient = net.first.weight.grad
    assert gradient is not None
    kept = [x.detach().clone() for x in (*first[:2], first.inner.total, first.count, gradient)]
    net.first.weight.grad = None
    graphed(*batch(device, 1)).loss.backward()
    for now, before in zip(
        (*first[:2], first.inner.total, first.count, gradient), kept, strict=True
    ):
        torch.testing.assert_close(now, before, rtol=0, atol=0)


def test_hooks_of_parameters_run_with_their_gradient() -> None:
    net, _, graphed, _ = made("cpu")
    seen: list[float] = []
    net.second.weight.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.sum())))
    graphed(*batch("cpu", 0)).loss.backward()
    assert len(seen) == 1
    assert net.second.weight.grad is not None
    assert seen[0] == pytest.approx(float(net.second.weight.grad.sum()))


def test_it_records_once_per_shape_and_again_when_a_weight_has_moved() -> None:
    net, twin, graphed, recorder = made("cpu")
    for rows in (4, 5, 4, 5):
        graphed(*batch("cpu", 0, rows=rows))
    assert recorder.recorded == 4, "forward and backward of two shapes"
    net.first.weight.data = torch.ones_like(net.first.weight)
    twin.first.weight.data = torch.ones_like(net.first.weight)
    assert_same(graphed(*batch("cpu", 0)), twin(*batch("cpu", 0)))
    assert recorder.recorded == 6


def test_a_function_without_gradients_needs_no_backward() -> None:
    recorder = Replayer()
    graphed = GraphedFunction(lambda x: x * 2, recorder=recorder)
    assert graphed(torch.tensor([1.0])).tolist() == [2.0]
    assert graphed(torch.tensor([4.0])).tolist() == [8.0]
    assert recorder.recorded == 1


def test_frozen_weights_have_no_gradient() -> None:
    net, _, graphed, _ = made("cpu")
    net.first.requires_grad_(False)
    x, weight = batch("cpu", 0)
    graphed(x, weight.detach()).loss.backward()
    assert net.first.weight.grad is None
    assert net.second.weight.grad is not None


def test_a_backward_after_a_later_call_is_an_error() -> None:
    """Its activations are gone: gradients would be those of the later call."""
    _, _, graphed, _ = made("cpu")
    first = graphed(*batch("cpu", 0))
    graphed(*batch("cpu", 1))
    with pytest.raises(AssertionError, match="before this backward"):
        first.loss.backward()


def micro_step(
    graphs: bool, device: str, steps: int, **train: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Train model and LensNet as the trainer does. All losses, then all weights."""
    config = run_config(mc_config(horizon_loss_weight=0.5), loss_chunk_entries=48, **train)
    net, mc = model(config).to(device).train(), config.mc
    torch.manual_seed(1)
    lens = wake(LensNet(mc, dim=32)).to(device)
    preference, moments = PreferenceLoss(mc, mc.rows_per_sequence), GainMoments(0.5, device)
    if graphs:

        def graphed(function: Any, module: nn.Module | None = None) -> GraphedFunction:
            recorder = Replayer() if device == "cpu" else CudaRecorder()
            return GraphedFunction(function, module, recorder=recorder)

        net.graphed = graphed(net.micro_step, net)
        lens.graphed = graphed(lens.row_scores, lens)
        preference.function = graphed(preference.function)
    parameters = [*net.parameters(), *lens.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses: list[Tensor] = []
    for step in range(steps):
        ids = tokens(mc, 2, seed=step).to(device)
        lods, starts = (x.to(device) for x in plan(mc, 2, first=2 + 2 * step))
        optimizer.zero_grad()
        output = net(ids, lods, starts)
        output.loss.backward()
        scores = lens(output.visible_entries, lods, starts, output.lod0, ids)
        result = preference(scores, lods, starts, output.row_scores, moments.moments)
        result.numerator.backward()
        moments.update(*result.gain_moments)
        losses += [output.loss.detach(), result.loss.detach(), result.statistics.pack().table]
        optimizer.step()
    return losses, [p.detach() for p in parameters]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recomputed", [0.0, 0.5, 1.0])
def test_model_and_lensnet_learn_the_same(device: str, recomputed: float) -> None:
    """Losses, metrics and weights of four steps, with graphs and without; float32."""
    fast, slow = (
        micro_step(graphs, device, 4, activation_checkpointing=recomputed)
        for graphs in (True, False)
    )
    for mine, right in zip((*fast[0], *fast[1]), (*slow[0], *slow[1]), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
