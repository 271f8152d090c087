"""LensNet's scores from fixed shapes, with padding, are those without, and are captured once for
many contexts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.focus.controller import MCController
from mc_ds.geometry import lod1_cover
from mc_ds.inference import InferenceModel, Session
from mc_ds.inference.reading import scorer
from mc_ds.inference.reading.scorer import LensInput
from mc_ds.model.recording import Capturing
from tests.support.factories import VOCAB
from tests.support.replayer import Replayer
from tests.support.sessions import history, inference_model

K, MULTIPLE = 4, 16
VARIANTS: list[dict[str, Any]] = [
    dict(lens_matches="words"),
    dict(lens_matches="words", position_scheme="order"),
    dict(lens_matches="meaning"),
    dict(lens_index=False),
    dict(lens_ask="none", lens_matches="words"),
    dict(lens_ask_reach="open", lens_layers=2, lens_block_scores="shared"),
]


def graphed(net: InferenceModel, recorder: Replayer) -> InferenceModel:
    """Let the sessions of a model capture LensNet."""
    assert net.lensnet is not None
    net.controller = MCController(
        LensInput(net.lensnet, net.nets, Capturing(torch.device("cpu"), recorder)).eval()
    )
    return net


def open_some(lods: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The cover in which every third of the gists is opened."""
    parts = [
        torch.arange(start, start + K) if lod and start // K % 3 == 0 else torch.tensor([start])
        for lod, start in zip(lods.tolist(), starts.tolist(), strict=True)
    ]
    levels = [
        torch.zeros_like(part) if len(part) > 1 else lod[None]
        for part, lod in zip(parts, lods, strict=True)
    ]
    return torch.cat(levels), torch.cat(parts)


def scores_of(session: Session, mc: MCConfig) -> list[Tensor]:
    """LensNet's scores of covers of the history and of its later parts."""
    lens, known = session.reader.contexts.lens, len(session)
    assert lens is not None
    geometry = mc.geometry.with_length(known - 1 + mc.horizon_tokens)
    lods, starts = lod1_cover(geometry)
    visible = lods.numel() - mc.horizon_tokens
    found = []
    with session.reader.networks.controller.inference():
        for first in (0, 3):
            whole = lods[first:visible], starts[first:visible]
            for plan in (whole, open_some(*whole)):
                found.append(lens.scores(plan[0][None], plan[1][None], known))
    return found


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_padding_changes_no_score(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Over histories that grow and become shorter again, so that padding holds what others left."""
    monkeypatch.setattr(scorer, "MULTIPLE", MULTIPLE)
    recorder, texts = Replayer(), history(400)
    sessions = [
        net.session("lens", 48)
        for net in (
            inference_model(max_lod=1, **options),
            graphed(inference_model(max_lod=1, **options), recorder),
        )
    ]
    mc, count = sessions[0].mc, 0
    for known in (121, 122, 137, 150, 121, 139):
        for session in sessions:
            session.truncate(0)
            session.ingest(texts[-known:])
        for expected, found in zip(*(scores_of(session, mc) for session in sessions), strict=True):
            assert expected.std() > 1e-3
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            count += 1
    assert 0 < recorder.recorded < count / 2


def test_sessions_of_one_model_share_graphs_and_few_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer, "MULTIPLE", MULTIPLE)
    monkeypatch.setattr(scorer, "MOST_CAPTURED", 2)
    recorder = Replayer()
    net = graphed(inference_model(max_lod=1, lens_matches="words"), recorder)

    def read(*lengths: int) -> None:
        for length in lengths:
            session = net.session("lens", 48)
            session.ingest(history(length))
            session.refocus()

    read(80, 80)
    first = recorder.recorded
    assert first > 0
    read(80, 80)
    assert recorder.recorded == first, "another session uses the graphs of the first"
    read(300, 300, 600, 600, 900, 900)
    assert recorder.recorded > first
    module = net.controller._lensnet
    assert isinstance(module, LensInput)
    assert len(module._fixed) == 2


def test_a_graph_in_use_outlives_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions take turns. What one captured stays, however many others come and go; and where more
    sizes than graphs take turns, most calls capture nothing.
    """
    monkeypatch.setattr(scorer, "MULTIPLE", MULTIPLE)
    monkeypatch.setattr(scorer, "MOST_CAPTURED", 2)
    recorder = Replayer()
    net = graphed(inference_model(max_lod=1, lens_matches=True), recorder)
    session = net.session("lens", 48)
    session.ingest(history(150))
    lens = session.reader.contexts.lens
    assert lens is not None
    tail = torch.arange(149 - lens.tail_len, 149)

    def captures(*more: int) -> int:
        """The captures for contexts of the tail and as many tokens before it."""
        before = recorder.recorded
        for count in more:
            starts = torch.cat([torch.arange(count), tail])[None]
            with net.controller.inference():
                lens.scores(torch.zeros_like(starts), starts, 150)
        return recorder.recorded - before

    assert captures(5, 5) == 1
    assert captures(25, 5, 25, 5, 45, 5, 45, 5, 65, 5, 65) == 3
    assert captures(5, 65) == 0
    assert captures(*[5, 25, 45] * 10) <= 15


def test_a_context_that_is_not_finite_does_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 may overflow in one history; the others of the model are scored as before."""
    monkeypatch.setattr(scorer, "MULTIPLE", MULTIPLE)
    recorder = Replayer()
    nets = inference_model(max_lod=1), graphed(inference_model(max_lod=1), recorder)
    for net in nets:
        with torch.no_grad():
            net.model.backbone.embedding.weight[-1] = torch.nan
    broken, *others = (net.session("lens", 48) for net in (nets[1], *nets))
    tail = torch.arange(149 - 10, 149)
    for session in (broken, *others):
        tokens = [token % (VOCAB - 1) for token in history(150)]
        session.ingest([VOCAB - 1, *tokens[1:]] if session is broken else tokens)

    def scores(session: Session, first: int) -> Tensor:
        starts = torch.cat([torch.arange(first, 17), tail])[None]
        lens = session.reader.contexts.lens
        assert lens is not None
        with session.reader.networks.controller.inference():
            return lens.scores(torch.zeros_like(starts), starts, 150)

    assert scores(broken, 0).isnan().any()
    assert scores(broken, 0).isnan().any()
    expected, found = (scores(session, 5) for session in others)
    assert recorder.recorded == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_many_entries_are_not_captured_and_several_contexts_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer, "MULTIPLE", MULTIPLE)
    monkeypatch.setattr(scorer, "MOST_ENTRIES", 2 * 32)
    recorder = Replayer()
    plain, session = (
        net.session("lens", 48)
        for net in (
            inference_model(max_lod=1, lens_matches="words"),
            graphed(inference_model(max_lod=1, lens_matches="words"), recorder),
        )
    )
    tail = torch.arange(149 - 10, 149)
    for rows, more, captured in (
        *((1, 90, 0), (1, 90, 0)),  # 100 entries
        *((3, 20, 0), (3, 20, 0)),  # 3 x 30
        *((2, 20, 0), (2, 20, 1), (2, 22, 1)),  # 2 x 30, then 2 x 32
    ):
        starts = torch.stack(
            [torch.cat([torch.arange(K * row, K * row + more), tail]) for row in range(rows)]
        )
        found = []
        for one in (plain, session):
            one.truncate(0)
            one.ingest(history(150))
            lens = one.reader.contexts.lens
            assert lens is not None
            with one.reader.networks.controller.inference():
                found.append(lens.scores(torch.zeros_like(starts), starts, 150))
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
        assert found[0].std() > 1e-3
        assert recorder.recorded == captured
