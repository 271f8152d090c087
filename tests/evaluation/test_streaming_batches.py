"""Documents in batches: every window as if it were read alone, the same as sessions where both are
defined, exactly the tokens that are asked for, and nothing of them in a choice.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch import evaluate
from mc_ds.config import ConfigError, DataConfig, FocusConfig, RetrievalConfig
from mc_ds.config.data import DatasetConfig
from mc_ds.data import open_data, open_dataset
from mc_ds.evaluation.batches import BatchReading
from mc_ds.evaluation.measure import Samples
from mc_ds.evaluation.sessions import Sessions
from mc_ds.evaluation.streaming.batches import DocumentBatches
from mc_ds.evaluation.streaming.documents import long_documents
from mc_ds.evaluation.streaming.records import save_stream
from mc_ds.evaluation.streaming.sessions import DocumentSessions
from mc_ds.evaluation.streaming.streaming import DocumentReader, Setting, Streaming
from mc_ds.focus.policies import POLICIES, PolicySpec
from mc_ds.focus.view import Plan
from mc_ds.inference import InferenceModel
from mc_ds.model.megacontext import ModelOutput
from mc_ds.tasks import TaskSample
from mc_ds.tasks.base import no_spans
from tests.support.datasets import write_dataset
from tests.support.factories import VOCAB, run_config
from tests.support.optional import needs
from tests.support.sessions import batches, history, inference_model
from tests.support.tiny_bundle import tiny_tokenizer, write

HORIZON, BUDGET, PREDICTED, T = 5, 48, 13, 96
CHOOSING = ["recency", "uniform", "lens", "blind", "bm25", "attention"]
RETRIEVAL = RetrievalConfig(query_tokens=6)


def spec_of(name: str) -> PolicySpec:
    return POLICIES[name].using(RETRIEVAL)


def streaming(
    reader: DocumentReader, names: list[str], *steps: int | None, predicted: int = PREDICTED
) -> Streaming:
    return Streaming(
        reader=reader,
        budget=BUDGET,
        predicted=predicted,
        settings=[Setting(spec_of(name), step) for step in steps for name in names],
    )


def losses_of(
    net: InferenceModel,
    documents: list[NDArray[np.int64]],
    names: list[str],
    step: int | None,
    batch_size: int = 2,
    predicted: int = PREDICTED,
) -> dict[str, NDArray[np.float64]]:
    """Losses [documents, N] by policy."""
    reader = DocumentBatches(batches(net, batch_size=batch_size))
    plan = streaming(reader, names, step, predicted=predicted)
    found: list[list[NDArray[np.float64]]] = [[] for _ in names]
    with reader.batches.controller.inference():
        for first in range(0, len(documents), batch_size):
            numbers = range(first, min(first + batch_size, len(documents)))
            for losses, reads in zip(
                found, plan.reader.read(plan, documents, numbers), strict=True
            ):
                losses += [read.losses for read in reads]
    return {name: np.stack(losses) for name, losses in zip(names, found, strict=True)}


def documents(count: int, step: int, predicted: int = PREDICTED) -> list[NDArray[np.int64]]:
    windows = len(range(0, predicted, step))
    length = T + 1 + (windows - 1) * step
    return [np.array(history(length, seed)) for seed in range(count)]


def sample(tokens: NDArray[np.int64]) -> TaskSample:
    return TaskSample(tokens, np.ones(HORIZON, np.float32), no_spans(), no_spans(), None)


def alone(
    net: InferenceModel, name: str, window: NDArray[np.int64], before: NDArray[np.int64]
) -> list[float]:
    """Losses of the horizon of one window, which is read by itself, beside that of another
    document.
    """
    reader, spec = batches(net, batch_size=1), spec_of(name)
    with reader.controller.inference(), torch.no_grad():
        samples = Samples([0], [sample(window)], [sample(before)])
        plan = reader.read(samples, [spec]).plan(spec, BUDGET)
        output = net.model(torch.from_numpy(window)[None], plan.lods, plan.starts)
    assert isinstance(output, ModelOutput)
    return output.entry_nll[0, -HORIZON:].tolist()


@needs("bm25s")
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("step", [2, None])
def test_every_window_is_read_as_if_alone(step: int | None, blocks: int) -> None:
    net, size = inference_model(random_blocks=blocks), step or HORIZON
    names = [name for name in CHOOSING if not (blocks and name == "uniform")]
    papers = documents(3, size)
    found = losses_of(net, papers, names, step)
    for name in names:
        for number, paper in enumerate(papers):
            before, expected = papers[number - 1 if number else 1], []
            for first in range(0, PREDICTED, size):
                part = slice(first, first + T + 1)
                expected += alone(net, name, paper[part], before[part])[:size]
            assert found[name][number] == pytest.approx(expected[:PREDICTED], abs=1e-5), name
    assert not np.allclose(found["blind"], found["lens"]), "the tail of another document"


@pytest.mark.parametrize("step", [2, 5])
def test_full_is_one_pass_over_the_last_window(step: int) -> None:
    net, papers = inference_model(), documents(2, step)
    found = losses_of(net, papers, ["full"], step)["full"]
    starts = torch.arange(T)[None]
    for paper, losses in zip(papers, found, strict=True):
        first = len(paper) - T - 1
        with torch.no_grad():
            output = net.model(torch.from_numpy(paper[first:])[None], starts * 0, starts)
        by_token = dict(
            zip(range(first + 1, len(paper)), output.entry_nll[0].tolist(), strict=True)
        )
        begins = T + 1 - HORIZON
        expected = [by_token[token] for token in range(begins, begins + PREDICTED)]
        assert losses == pytest.approx(expected, abs=1e-5)


@needs("bm25s")
@pytest.mark.parametrize(
    ("blocks", "focus"),
    [
        (0, FocusConfig()),
        (2, FocusConfig()),
        (2, FocusConfig(lens_blocks=4, neighbours=0.5)),
    ],
)
def test_sessions_agree(blocks: int, focus: FocusConfig) -> None:
    """On the last T + 1 tokens of a document: about its last h tokens, since a session's history
    is shorter before; under `full` about all.
    """
    net, names = inference_model(random_blocks=blocks), ["recency", "lens", "bm25", "full"]
    net.config = net.config.model_copy(update={"focus": focus})
    count = 2 * HORIZON
    papers = documents(2, HORIZON, count)
    by_batches = losses_of(net, papers, names, None, predicted=count)
    sessions = DocumentSessions(Sessions(model=net, mc=net.mc, focus=net.config.focus))
    plan = streaming(sessions, names, None, predicted=count)
    ends = [paper[-T - 1 :] for paper in papers]
    (*_, records) = plan.run(ends)
    changed = {"lens_blocks": blocks} if blocks else {}
    changed |= focus.model_dump(exclude_defaults=True)
    assert [record.settings for record in records] == [{}, changed, {}, {}]
    for number in range(2):
        for name, (read,) in zip(names, sessions.read(plan, ends, [number]), strict=True):
            same = count if name == "full" else HORIZON
            expected = by_batches[name][number][-same:]
            assert read.losses[-same:] == pytest.approx(expected, abs=1e-4), name


@needs("bm25s")
@pytest.mark.parametrize("step", [2, 5])
def test_exactly_these_tokens_are_predicted(step: int) -> None:
    """A token changes its own loss and later ones; the tokens after the last predicted one change
    nothing, in choices either.
    """
    net, names = inference_model(), [*CHOOSING, "full"]
    papers, begins = documents(2, step), T + 1 - HORIZON
    base = losses_of(net, papers, names, step)
    assert all(losses.shape == (2, PREDICTED) for losses in base.values())
    for place in (0, 1, step, PREDICTED - 1, PREDICTED):
        changed = [paper.copy() for paper in papers]
        for paper in changed:
            paper[begins + place :] = (paper[begins + place :] + 7) % VOCAB
        for name, losses in losses_of(net, changed, names, step).items():
            np.testing.assert_allclose(losses[:, :place], base[name][:, :place], atol=1e-5)
            if place < PREDICTED:
                assert (abs(losses[:, place] - base[name][:, place]) > 1e-3).all(), (name, place)


@needs("bm25s")
def test_the_context_is_chosen_from_the_visible_history(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: dict[int, list[Plan]] = {}
    chosen = BatchReading.plan

    def noted(reading: BatchReading, spec: PolicySpec, wc_length: int) -> Plan:
        plan = chosen(reading, spec, wc_length)
        assert plan.lods.size(1) == BUDGET
        plans.setdefault(shift, []).append(plan)
        return plan

    monkeypatch.setattr(BatchReading, "plan", noted)
    net, papers = inference_model(), documents(2, HORIZON, HORIZON)
    for shift in (0, 7):
        for paper in papers:
            paper[-HORIZON:] = (paper[-HORIZON:] + shift) % VOCAB
        losses_of(net, papers, CHOOSING, None, predicted=HORIZON)
    assert len(plans[0]) == len(CHOOSING)
    for one, other in zip(*plans.values(), strict=True):
        assert torch.equal(one.lods, other.lods)
        assert torch.equal(one.starts, other.starts)


def test_every_window_has_a_draw_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, chosen = [], BatchReading.plan

    def noted(reading: BatchReading, spec: PolicySpec, wc_length: int) -> Plan:
        plan = chosen(reading, spec, wc_length)
        drawn.extend(zip(plan.lods.tolist(), plan.starts.tolist(), strict=True))
        return plan

    monkeypatch.setattr(BatchReading, "plan", noted)
    losses_of(inference_model(), documents(2, HORIZON), ["random"], None)
    assert len(drawn) == 6
    assert all(one not in drawn[:place] for place, one in enumerate(drawn))


def test_batches_of_any_size_give_the_same() -> None:
    net, names = inference_model(), ["random", "lens", "blind", "full"]
    papers = [*documents(2, HORIZON), documents(1, HORIZON)[0]]
    one, three = (losses_of(net, papers, names, None, size) for size in (1, 3))
    for name in names:
        np.testing.assert_allclose(one[name], three[name], atol=1e-5)
    assert (one["full"][0] == one["full"][2]).all()


def test_several_intervals_predict_the_same_tokens_of_longer_documents() -> None:
    net = inference_model()
    reader = DocumentBatches(batches(net))
    plan = streaming(reader, ["recency", "full"], 2, 5, None)
    assert plan.document_tokens == T + 1 + 12
    assert streaming(reader, ["full"], None, predicted=10).document_tokens == T + 1 + 5
    assert streaming(reader, ["full"], 5, predicted=3).document_tokens == T + 1
    papers = [np.array(history(plan.document_tokens, seed)) for seed in range(3)]
    with reader.batches.controller.inference():
        first, last = plan.run(papers)
    assert [(r.policy, r.refocus, len(r.losses)) for r in last] == [
        (name, step, 3) for step in (2, 5, None) for name in ("recency", "full")
    ]
    assert [record.losses[:2] for record in last] == [record.losses for record in first]
    assert last[2].losses == last[4].losses, "never chooses for as many tokens as fit: h"
    assert all(record.predicted == PREDICTED and record.focus_ms > 0 for record in last)
    assert [record.wc_length for record in last[:2]] == [BUDGET, T]


def test_what_does_not_fit_is_refused() -> None:
    net = inference_model()
    reader = DocumentBatches(batches(net))
    with pytest.raises(ConfigError, match=r"refocus = 6: .*at most 5"):
        streaming(reader, ["recency"], 6)
    with pytest.raises(ConfigError, match=r"predict = 81 .*at most 80"):
        streaming(reader, ["recency"], 5, predicted=81)
    with pytest.raises(ConfigError, match="'oracle' cannot read documents"):
        streaming(reader, ["oracle"], 5)
    plan = streaming(reader, ["lens", "blind"], 5)
    with reader.batches.controller.inference(), pytest.raises(ConfigError, match="only one docu"):
        list(plan.run(documents(1, 5)))


WORDS = [" ".join(f"w{token}" for token in history(T + 30, seed)) for seed in range(12)]
OPTIONS = ["--refocus", "5,never", "--predict", "13", "--device", "cpu", "--query_tokens", "6"]


def evaluated(out: Path, *options: str) -> list[dict[str, Any]]:
    assert evaluate.main([*OPTIONS, *options, "--out", str(out)]) == 0
    records: list[dict[str, Any]] = json.loads(out.read_text())
    return records


@needs("bm25s")
def test_the_command_reads_a_dataset_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, root, lensnet = write(tmp_path / "bundle")
    dataset = write_dataset(tmp_path / "dataset", tiny_tokenizer(), WORDS)
    names, out, written = ["recency", "lens", "blind", "bm25", "full"], tmp_path / "s.json", []

    def noted(records: Any, path: Path) -> None:
        save_stream(records, path)
        written.append([len(record["losses"]) for record in json.loads(path.read_text())])

    monkeypatch.setattr("mc_ds.evaluation.streaming.stream.save_stream", noted)
    options = ["--checkpoint", str(bundle), "--policies", ",".join(names), "--batch_size", "2"]
    records = evaluated(out, *options, "--dataset", str(dataset), "--samples", "9")
    assert written == [[2] * 10, [3] * 10], "after every batch"
    said = capsys.readouterr()
    assert "warning: only 3 held-out documents have 107 tokens; 9 were requested" in said.err
    assert "lens_against" in said.out
    assert "the tail replaced by another sequence's: blind" in said.out

    net = InferenceModel(root, lensnet, run_config())
    shards = [open_dataset(dataset).validation]
    papers = long_documents(shards, length=T + 11, count=9, seed=0)
    expected = losses_of(net, papers, names, None)
    for record in records:
        assert record["losses"] == pytest.approx(expected[record["policy"]].mean(1), abs=1e-5)
    bm25 = next(record for record in records if record["policy"] == "bm25")
    difference = (expected["lens"] - expected["bm25"]).mean()
    assert bm25["lens_against"]["value"] == pytest.approx(difference, abs=1e-5)

    whole = ["--whole", "--policies", "recency", "--dataset", str(dataset)]
    assert len(evaluated(out, *options, *whole)[0]["losses"]) == len(WORDS)
    said = capsys.readouterr()
    assert "warning: only 12 documents have 107 tokens; 64 were requested" in said.err


def test_sessions_read_datasets_too(tmp_path: Path) -> None:
    bundle, *_ = write(tmp_path / "bundle")
    one, other = (
        write_dataset(tmp_path / name, tiny_tokenizer(), texts)
        for name, texts in (("one", WORDS[:4]), ("other", WORDS[4:]))
    )
    options = ["--bundle", str(bundle), "--policies", "recency", "--dataset", str(one)]
    records = evaluated(tmp_path / "s.json", *options, "--dataset", str(other))
    assert [len(record["losses"]) for record in records] == [3, 3]


def test_datasets_that_cannot_be_read_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", tiny_tokenizer(), WORDS)
    foreign = write_dataset(tmp_path / "foreign", tiny_tokenizer(VOCAB - 1), ["w1 w2"] * 8)
    fingerprint = open_data(DataConfig(datasets=[DatasetConfig(path=str(dataset))])).fingerprint
    bundle, *_ = write(tmp_path / "bundle", corpus=fingerprint)
    options = [*OPTIONS, "--checkpoint", str(bundle), "--out", str(tmp_path / "s.json")]
    for given, message in {
        ("--dataset", str(foreign)): f"dataset {foreign} was made with another tokenizer .* than"
        f" {bundle} .*--tokenizer {bundle}$",
        ("--dataset", str(tmp_path)): f"{tmp_path} is not a dataset",
        ("--dataset", str(dataset), "--whole"): "was trained on this text: .*without --whole",
        ("--dataset", str(dataset), "--seq_lens", "200"): "no held-out document has 211 tokens",
        ("--dataset", str(dataset), "--predict", "81"): "predict = 81 leaves no history",
        ("--whole",): "--whole reads documents of another text: give --refocus, and --dataset",
    }.items():
        assert evaluate.main([*options, *given]) == 2
        said = capsys.readouterr().err
        assert re.search(f"^error: .*{message}", said, re.MULTILINE), said
        assert said.count("error") == 1
    assert not (tmp_path / "s.json").exists()
