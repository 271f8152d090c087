"""Refocuses of a session whose contexts are tokens alone: captured and launched kernel by kernel
they choose the same contexts and say the same.
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import ConfigError, FocusConfig
from mc_ds.focus.controller import MCController
from mc_ds.inference import InferenceModel
from mc_ds.inference import model as inference_module
from mc_ds.inference.decoding.graphed import GraphedDecoder
from mc_ds.inference.reading import contexts, scorer
from mc_ds.inference.reading.contexts import HistoryView
from mc_ds.inference.reading.scorer import LensInput
from mc_ds.model.recording import Capturing
from tests.support.replayer import Replayer
from tests.support.sessions import history, inference_model
from tools.bench.inference import random_model


class Choice(NamedTuple):
    """A context that a session chose, and what it says there."""

    starts: NDArray[np.int64]
    scores: Tensor
    """LensNet's."""
    nll: Tensor


def choices(
    net: InferenceModel, tokens: Sequence[int], known: int, budget: int, every: int
) -> list[Choice]:
    """Read the tokens that follow the first `known` ones, with a choice before each `every`."""
    scored: list[Tensor] = []
    score = net.controller.score

    def spy(*args: Tensor | None) -> Tensor:
        scored.append(score(*args))
        return scored[-1]

    net.controller.score = spy  # type: ignore[method-assign, assignment]
    session, found = net.session("lens", budget), []
    session.ingest(tokens[:known])
    for first in range(known, len(tokens) - every + 1, every):
        nll = session.losses(tokens[first : first + every]).nll
        context = session.reader.context
        assert context is not None
        found.append(Choice(context.starts, scored[-1].cpu(), nll.cpu()))
        session.ingest(tokens[first : first + every])
    return found


def made(**mc: int) -> InferenceModel:
    return inference_model(random_blocks=3, max_lod=1, lens_matches="meaning", **mc)


@pytest.mark.parametrize("known", [60, 100])
def test_captured_refocuses_choose_and_say_the_same(
    monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    """Up to the length of training histories, and behind it, where a search finds the blocks."""
    tokens, recorder = history(known + 35), Replayer()
    expected = choices(made(), tokens, known, 48, 5)
    monkeypatch.setattr(scorer, "MULTIPLE", 16)
    monkeypatch.setattr(inference_module, "Decoder", partial(GraphedDecoder, recorder=recorder))
    net = made()
    assert net.lensnet is not None
    net.controller = MCController(
        LensInput(net.lensnet, net.nets, Capturing(torch.device("cpu"), recorder)).eval()
    )
    found = choices(net, tokens, known, 48, 5)
    assert recorder.recorded > 1, "the pass, and LensNet at some sizes"
    assert len(found) == len(expected) == 7
    assert len({choice.starts.tobytes() for choice in found}) == 7
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.starts, other.starts)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.nll, other.nll, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("known", [90, 100])
def test_neighbours_of_well_scored_blocks_are_opened(
    monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    """Also in a history that a search reads, where blocks that it did not find count as the worst
    found one.
    """
    monkeypatch.setattr(contexts, "SHORTLIST", 4)
    scored: list[Tensor] = []
    lens_blocks = HistoryView.lens_blocks
    monkeypatch.setattr(
        HistoryView, "lens_blocks", lambda view: scored.append(lens_blocks(view)) or scored[-1]
    )
    focus = FocusConfig(lens_blocks=4, neighbours=0.5)
    net = made()
    session, block = net.session("lens", 48, focus=focus), net.mc.block_size
    session.ingest(history(known))
    session.losses(history(5))
    context = session.reader.context
    assert context is not None
    scores = scored[-1][0].tolist()
    found = [score for score in scores if score > -math.inf]
    assert (len(found) < len(scores)) == (known > 96), "a search leaves blocks out"
    known_scores = [max(score, min(found)) for score in scores]

    def value(number: int) -> float:
        beside = [n for n in (number - 1, number + 1) if 0 <= n < len(scores)]
        return known_scores[number] + 0.5 * max(known_scores[n] for n in beside)

    places = context.starts - context.window.first
    opened = {number for number in range(len(scores)) if number * block in places}
    latest = max(number for number in range(len(scores)) if number not in opened) + 1
    chosen = sorted(number for number in opened if number < latest)
    candidates = sorted(range(latest), key=lambda number: (-value(number), -number))
    assert chosen
    assert chosen == sorted(candidates[: len(chosen)])


@pytest.mark.parametrize("focus", [FocusConfig(lens_blocks=3), FocusConfig(neighbours=0.5)])
def test_a_model_that_reads_covers_refuses_settings_of_tokens_alone(focus: FocusConfig) -> None:
    with pytest.raises(ConfigError, match="is for models that read tokens alone"):
        inference_model().session("lens", 48, focus=focus)


@pytest.mark.gpu
@pytest.mark.parametrize("known", [7800, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graphs_choose_and_say_the_same(known: int, dtype: torch.dtype) -> None:
    """At the shape of a real model with random weights; prints a table (TESTS_ON_GPU=1 pytest -s).

    Both read the same text, so that rounding cannot lead them apart. LensNet is float32 for both.
    """
    net = random_model("launch/recipes/pretrained/real_focus.yaml", "cuda", dtype, seed=0)
    # Few blocks and no neighbours: their scores lie further apart than rounding moves them.
    config = net.config.model_copy(update={"focus": FocusConfig(lens_blocks=6)})
    eager, graphed = (
        InferenceModel(net.model, net.lensnet, config, cuda_graphs=graphs)
        for graphs in (False, True)
    )
    tokens = history(known + 160)
    found, expected = (choices(net, tokens, known, 1000, 16) for net in (graphed, eager))
    rows = [
        (
            bool(np.array_equal(one.starts, other.starts)),
            float((one.scores - other.scores).abs().max()),
            float(other.scores.std()),
            float((one.nll - other.nll).abs().max()),
        )
        for one, other in zip(found, expected, strict=True)
    ]
    print(f"\n{known} tokens, {dtype}\nchoice  same context  scores differ by (std)  losses by")
    for number, (same, scores, spread, nll) in enumerate(rows):
        print(f"{number:6}  {same!s:>12}  {scores:12.2e} ({spread:.2f})  {nll:12.2e}")
    exact = dtype == torch.float32
    assert all(same for same, *_ in rows)
    assert max(scores for _, scores, *_ in rows) < 1e-3
    assert max(nll for *_, nll in rows) < (1e-3 if exact else 0.1)


@pytest.mark.gpu
def test_the_host_waits_once_for_scores_and_once_for_a_token() -> None:
    """A refocus waits for LensNet's scores, and as every step for the token that was drawn."""
    net = made()
    assert net.lensnet is not None
    session = InferenceModel(net.model.cuda(), net.lensnet.cuda(), net.config).session("lens", 48)
    session.ingest(history(60))
    pieces = session.stream(17)
    for _ in range(12):  # K = 4 tokens lie between refocuses: all is captured at the third
        next(pieces)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            assert len([next(pieces) for _ in range(4)]) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1 + 4, [str(wait.message) for wait in waits]
