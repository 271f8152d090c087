"""`focus.earlier_tokens` in batches and in sessions: the same contexts, for the controls too."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_ds.config import FocusConfig
from mc_ds.evaluation.measure import Samples
from mc_ds.evaluation.sessions import Sessions
from mc_ds.focus.policies import policy
from mc_ds.inference import InferenceModel
from mc_ds.tasks import TaskSample
from mc_ds.tasks.base import no_spans
from tests.support.factories import VOCAB
from tests.support.sessions import TRAINED, batches, history, inference_model

NAMES = ("lens", "blind", "other_question")
W, COUNT = 48, 8


def sample(tokens: NDArray[np.int64], horizon: int, other: TaskSample | None = None) -> TaskSample:
    mask = np.ones(horizon, dtype=np.float32)
    return TaskSample(tokens, mask, spans=no_spans(), distractors=no_spans(), other=other)


def samples_of(net: InferenceModel, index: int) -> Samples:
    """A history with another question in its last 15 visible tokens, and an unrelated one."""
    horizon = net.mc.horizon_tokens
    tokens, end = np.array(history(TRAINED + 1, index)), TRAINED - horizon
    asked = tokens.copy()
    asked[end - 15 : end] = (asked[end - 15 : end] + 7) % VOCAB
    unrelated = sample(np.array(history(TRAINED + 1, 100 + index)), horizon)
    return Samples([index], [sample(tokens, horizon, sample(asked, horizon))], [unrelated])


def chosen(net: InferenceModel, earlier: int) -> dict[str, dict[str, list[list[int]]]]:
    """First tokens of the visible entries of every context, by reader and policy."""
    focus = FocusConfig(lens_blocks=4, earlier_tokens=earlier)
    specs, together = [policy(name) for name in NAMES], batches(net, focus=focus, batch_size=1)
    readers = {"batches": together, "sessions": Sessions(model=net, mc=net.mc, focus=focus)}
    visible = W - net.mc.horizon_tokens
    found: dict[str, dict[str, list[list[int]]]] = {
        reader: {name: [] for name in NAMES} for reader in readers
    }
    with together.controller.inference(), net.controller.inference(), torch.no_grad():
        for index in range(COUNT):
            for name, reader in readers.items():
                reading = reader.read(samples_of(net, index), specs)
                for spec in specs:
                    starts = reading.plan(spec, W).starts[0, :visible]
                    found[name][spec.name].append(starts.tolist())
    return found


@pytest.mark.parametrize("matches", ["words", "meaning"])
@pytest.mark.parametrize("earlier", [6, 12])
def test_sessions_and_batches_choose_the_same(matches: str, earlier: int) -> None:
    net = inference_model(random_blocks=3, max_lod=1, lens_matches=matches)
    now, then = chosen(net, 0), chosen(net, earlier)
    assert then["batches"] == then["sessions"]
    changed = {name for name in NAMES if now["sessions"][name] != then["sessions"][name]}
    assert "lens" in changed
    differs = [name for name in NAMES if then["batches"][name] != then["batches"]["lens"]]
    assert differs == ["blind", "other_question"]
