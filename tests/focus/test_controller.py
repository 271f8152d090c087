"""The training invariant: one LensNet call per micro-step, no focus in training, and working
contexts built without LensNet.
"""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mc_ds
from mc_ds.config import FocusConfig
from mc_ds.data import MicroBatchDataset, MicroStep, Sample
from mc_ds.focus.allocator import FocusAllocator
from mc_ds.focus.controller import InvariantError, MCController, Phase
from mc_ds.model.lensnet import LensNet
from tests.support.factories import allocator, mc_config
from tests.support.tiny_run import TIMEOUT_S

PACKAGE = Path(mc_ds.__file__).parent


class CountingLens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        self.calls += 1
        return x * scale


def score(controller: MCController) -> Tensor:
    return controller.score(torch.ones(2), scale=torch.tensor(3.0))


def test_one_call_per_micro_step_is_made_and_counted() -> None:
    lens = CountingLens()
    controller = MCController(lens)
    assert controller.phase is Phase.TRAINING
    for _ in range(3):
        with controller.micro_step(lens_active=True):
            assert score(controller).tolist() == [3.0, 3.0]
    assert (controller.training_calls, controller.inference_calls, lens.calls) == (3, 0, 3)


def test_a_second_call_in_a_micro_step_raises_before_lensnet_runs() -> None:
    lens = CountingLens()
    controller = MCController(lens)
    with controller.micro_step(lens_active=True):
        score(controller)
        with pytest.raises(InvariantError, match="called twice"):
            score(controller)
    assert (controller.training_calls, lens.calls) == (1, 1)


def test_a_micro_step_without_its_call_raises() -> None:
    with (
        pytest.raises(InvariantError, match="did not call LensNet"),
        MCController(CountingLens()).micro_step(lens_active=True),
    ):
        pass


def test_before_its_start_lensnet_may_not_run() -> None:
    lens = CountingLens()
    controller = MCController(lens)
    with controller.micro_step(lens_active=False):
        pass
    with (
        pytest.raises(InvariantError, match="lens_start_step"),
        controller.micro_step(lens_active=False),
    ):
        score(controller)
    assert (controller.training_calls, lens.calls) == (0, 0)


def test_outside_a_micro_step_lensnet_may_not_run_in_training() -> None:
    lens = CountingLens()
    controller = MCController(lens)
    with pytest.raises(InvariantError, match="outside a micro-step"):
        score(controller)
    with controller.micro_step(lens_active=True):
        score(controller)
    with pytest.raises(InvariantError, match="outside a micro-step"):
        score(controller)
    assert lens.calls == 1


def test_micro_steps_do_not_nest_and_do_not_mix_with_inference() -> None:
    controller = MCController(CountingLens())
    with controller.micro_step(lens_active=False):
        with (
            pytest.raises(InvariantError, match="nested"),
            controller.micro_step(lens_active=False),
        ):
            pass
        with (
            pytest.raises(InvariantError, match="inside a training micro-step"),
            controller.inference(),
        ):
            pass
    with (
        controller.inference(),
        pytest.raises(InvariantError, match=r"inside controller\.inference"),
        controller.micro_step(lens_active=True),
    ):
        pass
    assert controller.phase is Phase.TRAINING, "whatever was raised"
    with controller.micro_step(lens_active=True):
        score(controller)


def test_an_error_in_a_micro_step_is_the_one_that_is_seen() -> None:
    controller = MCController(CountingLens())
    with pytest.raises(ZeroDivisionError), controller.micro_step(lens_active=True):
        raise ZeroDivisionError
    with controller.micro_step(lens_active=True):
        score(controller)


def test_inference_scores_freely_and_counts_apart() -> None:
    controller = MCController(CountingLens())
    with controller.inference():
        assert controller.phase is Phase.INFERENCE
        score(controller)
        with controller.inference():
            score(controller)
        assert controller.phase is Phase.INFERENCE, "the inner block gives back what it found"
        score(controller)
    assert controller.phase is Phase.TRAINING
    assert (controller.training_calls, controller.inference_calls) == (0, 3)


def test_an_error_in_inference_ends_the_phase() -> None:
    controller = MCController(CountingLens())
    with pytest.raises(ZeroDivisionError), controller.inference():
        raise ZeroDivisionError
    assert controller.phase is Phase.TRAINING


def test_the_focus_allocator_is_for_inference() -> None:
    controller, geometry = MCController(CountingLens()), mc_config().geometry
    with pytest.raises(InvariantError, match="focus allocator is inference-only"):
        FocusAllocator(controller, geometry, FocusConfig())
    with (
        pytest.raises(InvariantError, match="focus allocator is inference-only"),
        controller.micro_step(lens_active=False),
    ):
        FocusAllocator(controller, geometry, FocusConfig())
    with controller.inference():
        kept = FocusAllocator(controller, geometry, FocusConfig())
        plan = allocator(mc_config()).sample(1, (0, 0))
        lods, starts = torch.from_numpy(plan[0]), torch.from_numpy(plan[1])
        kept.focus(lods, starts, score=lambda lods, starts: torch.zeros(lods.shape))
    with pytest.raises(InvariantError, match="focus allocator is inference-only"):
        kept.focus(lods, starts, score=lambda lods, starts: torch.zeros(lods.shape))


def test_a_run_without_lensnet_says_so() -> None:
    controller = MCController(None)
    with pytest.raises(InvariantError, match="num_random_variants = 0"), controller.inference():
        score(controller)


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file names in its imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("mc_ds")}


def test_no_builder_of_contexts_names_lensnet_or_its_holders() -> None:
    builders = [PACKAGE / "variants.py", PACKAGE / "geometry.py", *(PACKAGE / "data").glob("*.py")]
    assert len(builders) > 5
    forbidden = (
        "mc_ds.model.lensnet",
        "mc_ds.focus.controller",
        "mc_ds.preference",
        "mc_ds.training",
        "mc_ds.model.megacontext",
    )
    found = {
        (path.name, name)
        for path in builders
        for name in imports_of(path)
        if name.startswith(forbidden)
    }
    assert found == set()


def test_building_contexts_never_imports_lensnet() -> None:
    """In a fresh interpreter, since here everything is imported already."""
    program = (
        "import sys, mc_ds.variants, mc_ds.data\n"
        "seen = [m for m in sys.modules if m.startswith(('mc_ds.model.lensnet', "
        "'mc_ds.focus.controller', 'mc_ds.model.megacontext', 'mc_ds.training'))]\n"
        "assert not seen, seen"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


class Silence:
    def sample(self, index: int, stage: int) -> Sample:
        return Sample(np.zeros(97, np.int64), np.ones(5, np.float32))


def test_batches_and_variants_are_made_while_lensnet_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise AssertionError("LensNet was touched")

    for name in ("__init__", "__call__", "forward", "score", "index_table", "entry_index"):
        monkeypatch.setattr(LensNet, name, refuse)
    with pytest.raises(AssertionError, match="touched"):
        LensNet(mc_config(), dim=32)
    mc = mc_config()
    data = MicroBatchDataset(
        Silence(), mc, seed=0, micro_batch_size=2, rank=0, world_size=1, accumulation_steps=1
    )
    assert data[MicroStep(0, 0, mc.train_wc_length, 0)].lods.shape == (8, 48)
    assert allocator(mc).sample(3, (0, 0))[0].shape == (3, 48)
    assert calls == 1, "the one that this test made"
