"""The drawing of the policies' contexts: its data say what the plans say, and the figure shows
them, for every shape of history.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from launch import evaluate
from mc_ds.config import FocusConfig, MCConfig
from mc_ds.drawing import NOT_READ
from mc_ds.evaluation import focus_plot
from mc_ds.evaluation.batches import Batches
from mc_ds.evaluation.focus_file import save_focus_maps
from mc_ds.evaluation.focus_plot import runs, save_focus_plot, spread
from mc_ds.evaluation.measure import Evaluator
from mc_ds.evaluation.sessions import Sessions
from mc_ds.evaluation.views import Focus, focus_lines
from mc_ds.focus.controller import MCController
from mc_ds.inference import InferenceModel
from mc_ds.model.lensnet import LensNet
from mc_ds.tasks import TaskSample
from mc_ds.tasks.base import no_spans
from tests.support.factories import VOCAB, mc_config, model, run_config, wake

ASSET = Path(__file__).parents[2] / "assets" / "recall_small"
MC = mc_config()
NAMES = ["recency", "random", "lens", "blind", "full", "tail"]


class Planted:
    """Random tokens; of its three spans that matter one crosses blocks, and one stands in the
    tail.
    """

    name = "planted"

    def sample(self, index: int, stage: int = 0) -> TaskSample:
        rng = np.random.default_rng(index)
        spans = np.array(
            [
                [4 * rng.integers(0, 9), 0],
                [41 + 4 * rng.integers(0, 5), 0],
                [MC.geometry.head_len, 0],
            ]
        )
        spans[:, 1] = spans[:, 0] + [3, 6, 2]
        return TaskSample(
            rng.integers(0, VOCAB, MC.seq_len + 1),
            np.ones(MC.horizon_tokens, np.float32),
            spans,
            np.array([[0, 2]]),
            None,
        )


@pytest.fixture(scope="module")
def evaluators() -> tuple[Evaluator, Evaluator]:
    """The same untrained networks, read in batches and by sessions."""
    config, cpu = run_config(MC), torch.device("cpu")
    torch.manual_seed(1)
    root, lensnet = model(config).eval(), wake(LensNet(MC, dim=32)).eval()
    focus = FocusConfig(threshold=0.0)
    by_sessions = Sessions(model=InferenceModel(root, lensnet, config), mc=MC, focus=focus, seed=3)
    return Evaluator(
        Batches(
            forward=root,
            mc=MC,
            controller=MCController(lensnet),
            focus=focus,
            seed=3,
            batch_size=4,
            device=cpu,
        )
    ), Evaluator(by_sessions)


def contexts(evaluator: Evaluator, index: int) -> Focus:
    if isinstance(evaluator.reader, Sessions):
        return evaluator.contexts(Planted(), NAMES, 0.5, index)
    assert isinstance(evaluator.reader, Batches)
    with evaluator.reader.controller.inference():
        return evaluator.contexts(Planted(), [*NAMES, "oracle"], 0.5, index)


@pytest.mark.parametrize("which", [0, 1])
def test_a_span_is_marked_as_read_exactly_where_its_tokens_are_entries(
    evaluators: Any, which: int
) -> None:
    seen = set()
    for index in range(6):
        focus = contexts(evaluators[which], index)
        for policy, (lods, starts) in focus.contexts.items():
            read = {int(start) for lod, start in zip(lods, starts, strict=True) if lod == 0}
            whole = [set(range(first, last)) <= read for first, last in focus.sample.spans.tolist()]
            assert focus.opened(policy).tolist() == whole
            seen.update((policy, opened) for opened in whole)
            levels = focus.token_lods(policy)
            assert set(np.flatnonzero(levels == 0).tolist()) == read
            for lod, start in zip(lods, starts, strict=True):
                assert (levels[start : start + MC.block_size**lod] == lod).all()
            assert (levels[: starts[0]] == NOT_READ).all()
            assert (levels[focus.known :] == (0, NOT_READ)[which]).all(), (
                "a session has not seen the horizon"
            )
    assert {
        (policy, opened) for policy in ("random", "lens", "recency") for opened in (True, False)
    } <= seen
    assert ("full", False) not in seen


def test_what_is_drawn_is_what_the_records_count(evaluators: Any) -> None:
    batches, ids = evaluators[0], range(6)
    with batches.reader.controller.inference():
        records = batches.run(Planted(), ["recency", "lens", "blind", "oracle"], [0.5], ids)
        drawn = [
            batches.contexts(Planted(), ["recency", "lens", "blind", "oracle"], 0.5, index)
            for index in ids
        ]
    for record in records:
        assert record.hit_rate == pytest.approx(
            np.mean([focus.opened(record.policy) for focus in drawn])
        )


def test_both_ways_to_evaluate_draw_the_same(evaluators: Any) -> None:
    batches, sessions = (contexts(evaluator, 1) for evaluator in evaluators)
    assert (batches.title, batches.known) == (sessions.title, sessions.known)
    assert batches.title == "planted, sequence 1, 48 entries for 96 tokens"
    for policy in sessions.contexts:
        assert batches.opened(policy).tolist() == sessions.opened(policy).tolist()
        np.testing.assert_array_equal(
            batches.token_lods(policy)[: batches.known],
            sessions.token_lods(policy)[: sessions.known],
        )


def test_texts_of_spans_are_decoded_once_for_lines_and_figure(evaluators: Any) -> None:
    focus = contexts(evaluators[0], 0)
    told = focus.with_texts(lambda tokens: f" {len(tokens)}\n")
    assert told.texts == ["3", "6", "2"]
    assert focus_lines(told) == [*focus_lines(focus), f"{'asked for':>15}  3, 6, 2"]


@pytest.mark.parametrize("which", [0, 1])
def test_rounds_lead_from_the_even_cover_to_the_choice(evaluators: Any, which: int) -> None:
    focus = contexts(evaluators[which], 1)
    assert set(focus.rounds) == {"lens", "blind"}
    begins = [focus.rounds[policy][0] for policy in ("lens", "blind")]
    assert begins[0].lods.tolist() == begins[1].lods.tolist(), "whatever the policy is told"
    assert len(focus.rounds["lens"]) == FocusConfig().iterations
    for scored in focus.rounds["lens"]:
        assert len(scored.lods) == len(scored.starts) == focus.wc_length
        assert scored.scores.shape == (focus.wc_length - focus.horizon,)
        assert np.ptp(scored.scores) > 0
        assert scored.starts.tolist() == [0, *np.cumsum(MC.block_size**scored.lods)[:-1]]
    assert begins[0].lods.tolist() != focus.contexts["lens"][0].tolist()[: focus.wc_length]


def test_both_ways_to_evaluate_come_to_the_choice_alike(evaluators: Any) -> None:
    batches, sessions = (contexts(evaluator, 1).rounds["lens"] for evaluator in evaluators)
    for one, two in zip(batches, sessions, strict=True):
        np.testing.assert_array_equal(one.lods, two.lods)
        np.testing.assert_array_equal(one.starts, two.starts)
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)


def test_the_file_of_maps_holds_texts_and_contexts(evaluators: Any, tmp_path: Path) -> None:
    focus = contexts(evaluators[0], 0).with_texts(lambda ids: "".join(f"<{i}>" for i in ids))
    path = save_focus_maps([focus], "a/bundle", tmp_path / "new" / "x_focus.json")
    content = json.loads(path.read_text())
    assert content["model"] == "a/bundle"
    (told,) = content["maps"]
    assert told["pieces"] == [f"<{token}>" for token in focus.sample.tokens]
    assert (told["title"], told["known"]) == (focus.title, focus.known)
    assert told["spans"] == focus.sample.spans.tolist()
    for policy, (lods, starts) in focus.contexts.items():
        *rounds, read = told["contexts"][policy]
        assert read == {"first": int(starts[0]), "lods": lods.tolist()}
        assert len(rounds) == len(focus.rounds.get(policy, ()))
    scores = told["contexts"]["lens"][0]["scores"]
    np.testing.assert_allclose(scores, focus.rounds["lens"][0].scores, atol=1e-4)


def test_scores_that_are_not_finite_are_null(evaluators: Any, tmp_path: Path) -> None:
    focus = contexts(evaluators[0], 0)
    scored = focus.rounds["lens"][0]
    scored.scores[:3] = [np.nan, np.inf, 0.25]
    path = save_focus_maps([focus], "m", tmp_path / "x_focus.json")
    scores = json.loads(path.read_text())["maps"][0]["contexts"]["lens"][0]["scores"]
    assert scores[:3] == [None, None, 0.25]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that were saved."""
    saved: list[Figure] = []
    close = focus_plot.plt.close
    monkeypatch.setattr(focus_plot.plt, "close", saved.append)
    yield saved
    for figure in saved:
        close(figure)


def synthetic(mc: MCConfig, spans: int, unasked: int) -> Focus:
    """A context that is coarsest at the beginning and has every level, and the recency window."""
    geometry, rng = mc.geometry, np.random.default_rng(0)
    lods, starts, start = [], [], 0
    while start < geometry.seq_len:
        coarsest = max(0, geometry.max_lod - start * (geometry.max_lod + 1) // geometry.head_len)
        level = max(level for level in range(coarsest + 1) if start % mc.block_size**level == 0)
        lods.append(level)
        starts.append(start)
        start += mc.block_size**level
    recent = np.arange(geometry.seq_len - 64, geometry.seq_len)
    plans = {"lens": (np.array(lods), np.array(starts)), "recency": (np.zeros_like(recent), recent)}
    ranges = [
        np.sort(rng.integers(0, geometry.seq_len - 64, n))[:, None] + [0, 4] if n else no_spans()
        for n in (spans, unasked)
    ]
    sample = TaskSample(
        np.zeros(geometry.seq_len + 1, np.int64), np.ones(8, np.float32), ranges[0], ranges[1], None
    )
    return Focus("a_task", 0, geometry, 8, len(lods), plans, sample, texts=["$x_1$=a\nb"] * spans)


@pytest.mark.parametrize(("seq_len", "max_lod"), [(512, 1), (2048, 2), (16384, 3)])
@pytest.mark.parametrize(("spans", "unasked"), [(3, 40), (40, 0), (0, 0)])
def test_the_figure_has_a_panel_per_sequence_and_says_what_is_in_it(
    tmp_path: Path, figures: list[Figure], seq_len: int, max_lod: int, spans: int, unasked: int
) -> None:
    mc = MCConfig(
        seq_len=seq_len,
        block_size=8,
        max_lod=max_lod,
        train_wc_length=seq_len,
        recent_tokens=32,
        horizon_tokens=8,
    )
    focus = synthetic(mc, spans, unasked)
    path = save_focus_plot([focus, replace(focus, index=1)], tmp_path / "new" / "a_focus.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        f"a_task, sequence {i}, {focus.wc_length} entries for {seq_len} tokens" for i in (0, 1)
    ]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    levels = [
        "tokens",
        "gists of 8 tokens",
        "gists of gists (64 tokens)",
        "gists of gists of gists (512 tokens)",
    ]
    assert words[: max_lod + 2] == [*levels[: max_lod + 1], "not read"]
    assert ("asked for: read in full" in words, "not asked for" in words) == (
        spans > 0,
        unasked > 0,
    )
    said = [text.get_text() for text in figure.axes[0].texts]
    for policy in focus.contexts:
        assert (f"{focus.opened(policy).sum()} of {spans}" in said) == (spans > 0)
    assert said.count("$x_1$=a b") == (spans if spans < 40 else 0), (
        "texts that do not fit are left out"
    )


def test_sequences_beyond_what_an_image_holds_are_counted(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focus_plot, "MOST_PANELS", 2)
    mc = MCConfig(
        seq_len=512,
        block_size=8,
        max_lod=1,
        train_wc_length=512,
        recent_tokens=32,
        horizon_tokens=8,
    )
    save_focus_plot([synthetic(mc, 1, 1)] * 5, tmp_path / "focus.png")
    assert len(figures[0].axes) == 2
    assert "3 more" in figures[0].axes[-1].get_xlabel()


def test_runs_and_places() -> None:
    assert runs(np.array([0, 0, 1, 0, -1, -1]), 0).tolist() == [[0, 2], [3, 1]]
    assert runs(np.array([0, 0, 1, 0, -1, -1]), -1).tolist() == [[4, 2]]
    assert runs(np.array([0, 0]), 2).tolist() == []
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        centres, widths = rng.uniform(0, 100, count), rng.uniform(1, 12, count)
        places = spread(centres, widths, 100.0)
        assert places is not None
        order = np.argsort(centres)
        left, right = (places - widths / 2)[order], (places + widths / 2)[order]
        assert left[0] >= -1e-9
        assert right[-1] <= 100 + 1e-9
        assert (left[1:] >= right[:-1] - 1e-9).all()
    free = spread(np.array([70.0, 20.0]), np.array([10.0, 10.0]), 100.0)
    assert free is not None
    np.testing.assert_allclose(free, [70, 20])
    assert spread(np.zeros(3), np.full(3, 40.0), 100.0) is None


@pytest.mark.slow
@pytest.mark.parametrize("source", ["--bundle", "--checkpoint"])
def test_png_and_maps_are_written_only_where_focus_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--tasks",
        "recall,corpus",
        "--policies",
        "recency,lens",
        "--seed",
        "7",
        "--samples",
        "2",
        "--device",
        "cpu",
    ]
    said = []
    for name, more in (("shown", ["--show_focus", "1"]), ("plain", [])):
        assert (
            evaluate.main(
                [source, str(ASSET), *options, *more, "--out", str(tmp_path / f"{name}.json")]
            )
            == 0
        )
        said.append(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "plain.json",
        "plain_budget.png",
        "shown.json",
        "shown_budget.png",
        "shown_focus.json",
        "shown_focus.png",
    ]
    assert (
        said[0]
        .strip()
        .endswith(f"plots: {tmp_path / 'shown_budget.png'}, {tmp_path / 'shown_focus.png'}")
    )
    assert said[1].strip().endswith(f"plots: {tmp_path / 'plain_budget.png'}")
    assert (tmp_path / "shown.json").read_text() == (tmp_path / "plain.json").read_text()
