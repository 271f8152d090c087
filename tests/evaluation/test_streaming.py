"""Streaming against whole forwards at every choice, exact budgets, and figures by document."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch import evaluate
from mc_ds.config import ConfigError, RetrievalConfig
from mc_ds.data.run_data import Domain
from mc_ds.data.shards import ShardWriter, TokenShards
from mc_ds.evaluation.sessions import Sessions
from mc_ds.evaluation.streaming.documents import long_documents
from mc_ds.evaluation.streaming.records import (
    Estimate,
    StreamRecord,
    compared,
    mean_of,
    ratio_of,
    stream_table,
)
from mc_ds.evaluation.streaming.sessions import DocumentSessions
from mc_ds.evaluation.streaming.streaming import Setting, Streaming
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import POLICIES, last_tokens
from mc_ds.inference import InferenceModel, Session
from mc_ds.model.megacontext import ModelOutput, NodeTable
from tests.support.factories import VOCAB
from tests.support.optional import needs
from tests.support.sessions import batch_view, history, inference_model, read_by_batches

HORIZON, BUDGET, PREDICTED, T = 5, 48, 13, 96
NAMES = ["recency", "uniform", "lens", "bm25", "attention", "full"]
RETRIEVAL = RetrievalConfig(query_tokens=6)


def specs() -> list[Any]:
    return [POLICIES[name].using(RETRIEVAL) for name in NAMES]


def streaming(net: InferenceModel, refocus: int | None, **changes: Any) -> Streaming:
    given: dict[str, Any] = dict(
        reader=DocumentSessions(Sessions(model=net, mc=net.mc, focus=net.config.focus)),
        budget=BUDGET,
        predicted=PREDICTED,
        settings=[Setting(spec, refocus) for spec in specs()],
    )
    return Streaming(**given | changes)


def document(seed: int) -> NDArray[np.int64]:
    return np.array(history(T + 1, seed))


def slow_losses(
    net: InferenceModel, name: str, tokens: NDArray[np.int64], known: int, count: int
) -> list[float]:
    """Losses of `count` tokens after the first `known`, in the context that the policy chooses for
    these: a forward of its own, in which zeros stand for all that follows.
    """
    length = known - 1 + HORIZON
    mc = read_by_batches(net, length, BUDGET)
    ids = torch.zeros(1, length + 1, dtype=torch.int64)
    ids[0, : known + count] = torch.from_numpy(tokens[: known + count])
    controller = MCController(net.lensnet)
    with controller.inference(), torch.no_grad():
        nodes = net.model(ids)
        assert isinstance(nodes, NodeTable)
        view = batch_view(net, mc, controller, ids, nodes, [(0, 0)])
        full = name == "full"
        choose = last_tokens if full else POLICIES[name].using(RETRIEVAL).choose
        plan = choose(view, length if full else mc.train_wc_length)
        output = net.model(ids, plan.lods, plan.starts)
    assert isinstance(output, ModelOutput)
    return output.entry_nll[0, -HORIZON : length + 1].tolist()[:count]


@needs("bm25s")
@pytest.mark.parametrize("scheme", ["span", "order"])
@pytest.mark.parametrize("refocus", [1, 4, None])
def test_every_token_has_the_loss_of_a_whole_forward(scheme: str, refocus: int | None) -> None:
    net, other = (inference_model(position_scheme=scheme) for _ in range(2))
    tokens, step = document(3), refocus or HORIZON
    (records,) = streaming(net, refocus).run([tokens])
    for record in records:
        expected: list[float] = []
        for known in range(T + 1 - PREDICTED, T + 1, step):
            count = min(step, T + 1 - known)
            expected += slow_losses(other, record.policy, tokens, known, count)
        assert len(expected) == record.predicted == PREDICTED
        assert record.losses == pytest.approx([np.mean(expected)], abs=1e-5), record.policy


@needs("bm25s")
def test_all_policies_have_as_many_entries_at_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[int]] = {}
    losses = Session.losses

    def counted(session: Session, tokens: Any) -> Any:
        found = losses(session, tokens)
        whole = session.settings.budget > BUDGET
        name = "full" if whole else session.settings.policy
        read.setdefault(name, []).append(len(session.working_context()[0]))
        return found

    monkeypatch.setattr(Session, "losses", counted)
    net = inference_model()
    list(streaming(net, 2).run([document(1), document(2)]))
    steps = range(T + 1 - PREDICTED, T + 1, 2)
    geometries = [net.mc.geometry.with_length(known - 1 + HORIZON) for known in steps]
    entries = [g.reachable_at_most(BUDGET) - HORIZON + 1 for g in geometries]
    assert len(set(entries)) > 1
    assert read.pop("full") == [*steps] * 2
    assert set(read) == set(NAMES) - {"full"}
    assert all(found == entries * 2 for found in read.values())


@needs("bm25s")
def test_records_come_after_each_document_and_do_not_depend_on_the_others() -> None:
    net = inference_model()
    papers = [document(seed) for seed in range(3)]
    first, _, last = streaming(net, 4).run(papers)
    (alone,) = streaming(net, 4).run(papers[:1])
    for one, three, single in zip(first, last, alone, strict=True):
        assert one.losses == single.losses == three.losses[:1]
        assert len(three.losses) == 3
        assert one.loss.stderr is None
        assert three.focus_ms > 0
    means = {record.policy: np.array(record.losses) for record in last}
    bm25 = next(record for record in last if record.policy == "bm25")
    assert bm25.against_recency == mean_of(means["bm25"] - means["recency"])
    assert (bm25.query_tokens, bm25.refocus, bm25.wc_length) == (6, 4, BUDGET)


def test_what_does_not_fit_is_refused() -> None:
    net = inference_model()
    with pytest.raises(ConfigError, match=r"refocus = 6: .*at most 5"):
        streaming(net, 6)
    with pytest.raises(ConfigError, match=r"predict = 90 .*at most 80"):
        streaming(net, 4, predicted=90)
    with pytest.raises(ConfigError, match="'oracle' cannot read documents"):
        streaming(net, 4, settings=[Setting(POLICIES["oracle"], 4)])


def record(policy: str, losses: list[float], refocus: int | None = 16) -> StreamRecord:
    return StreamRecord(
        policy=policy,
        query_tokens=None,
        refocus=refocus,
        wc_length=48,
        seq_len=96,
        predicted=8,
        loss=mean_of(np.array(losses)),
        focus_ms=0.25,
        losses=losses,
    )


def test_differences_are_paired_within_a_cadence() -> None:
    records = [
        record("recency", [2.0, 3.0, 4.0]),
        record("lens", [1.5, 2.75, 3.0]),
        record("full", [1.0, 2.0, 2.0]),
        record("recency", [5.0, 5.0, 5.0], None),
        record("lens", [4.0, 5.0, 6.0], None),
        record("full", [5.0, 5.0, 5.5], None),
        record("lens", [1.0], 8),
    ]
    recency, lens, full, latest, never, _, alone = compared(records)
    differences = np.array([-0.5, -0.25, -1.0])
    assert lens.against_recency == pytest.approx(
        (differences.mean(), differences.std(ddof=1) / math.sqrt(3))
    )
    assert recency.lens_against == lens.against_recency
    assert lens.lens_against == (0.0, 0.0)
    assert full.lens_against == pytest.approx((0.75, 0.25 / math.sqrt(3)))
    assert latest.lens_against == pytest.approx((0.0, 1 / math.sqrt(3)))
    assert compared([record("full", [1.0])])[0].lens_against is None
    assert lens.recovered is not None
    assert lens.recovered.value == pytest.approx(1.75 / 4.0)
    assert full.recovered == pytest.approx((1.0, 0.0))
    assert never.against_recency == pytest.approx((0.0, 1 / math.sqrt(3)))
    assert never.recovered is None, "full is no better: there is nothing to recover"
    assert alone.against_recency is alone.recovered is None
    noisy = [record("recency", [5.0, 5.0, 5.0]), record("full", [3.0, 5.0, 6.5])]
    assert compared(noisy)[0].recovered is None, "full is below recency by less than the error"
    clear = [record("recency", [5.0, 5.0, 5.0]), record("full", [3.0, 5.0, 4.5])]
    assert compared(clear)[0].recovered == (0.0, 0.0)
    one = [record("recency", [5.0]), record("full", [3.0])]
    assert compared(one)[0].recovered == (0.0, None), "one document has no error"
    equal = [record("recency", [5.0]), record("full", [5.0])]
    assert compared(equal)[0].recovered is None
    lines = stream_table([lens, replace(never, query_tokens=4), alone, full]).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns below their names"
    assert re.split(r"\s+", lines[0])[-5:-2] == ["against_recency", "lens_against", "recovered"]
    assert "+0.7500 ± 0.1443" in lines[4]
    assert "  -0.5833 ± 0.2205  +0.0000 ± 0.0000  0.438" in re.sub(r"\s{2,}", "  ", lines[1])
    assert lines[2].split()[:3] == ["never", "lens", "4"]
    assert lines[3].split()[-4:] == ["+0.0000", "-", "0.25", "1"]


def test_the_error_of_a_ratio_is_that_of_leaving_documents_out() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(1.0, 0.3, 400)
    part = 0.4 * whole + rng.normal(0, 0.2, 400)
    left_out = np.array(
        [np.delete(part, i).mean() / np.delete(whole, i).mean() for i in range(400)]
    )
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    ratio = ratio_of(part, whole)
    assert ratio == pytest.approx(Estimate(part.mean() / whole.mean(), jackknife), rel=0.01)


def shards_of(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents of the token n alone, the n-th of them with its length."""
    with ShardWriter(folder, vocab_size=VOCAB, tokenizer_sha256="x", shard_tokens=100) as writer:
        for number, length in enumerate(lengths, 1):
            writer.append(np.array([number] * length, np.int64))
    return TokenShards(folder)


def test_documents_are_long_whole_and_each_drawn_once(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [40, 39, 41, 200, 0, 40])
    drawn = long_documents([shards], length=40, count=9, seed=1)
    assert sorted(set(piece.tolist()).pop() for piece in drawn) == [1, 3, 4, 6]
    assert all(len(piece) == 40 and len(set(piece.tolist())) == 1 for piece in drawn)
    again = long_documents([shards], length=40, count=4, seed=1)
    np.testing.assert_array_equal(again, drawn)
    assert long_documents([shards], length=201, count=1, seed=0) == []


@needs("bm25s")
def test_the_command_writes_records_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = inference_model()
    shards = shards_of(tmp_path / "val", [120, 97])
    corpus = SimpleNamespace(val=(Domain("text", 1.0, shards),))
    weights = SimpleNamespace(corpus=lambda other: corpus)
    monkeypatch.setattr(evaluate, "load_bundle", lambda *_, **__: net)
    monkeypatch.setattr(evaluate, "open_weights", lambda *_, **__: weights)
    out = tmp_path / "stream.json"
    options = ["--bundle", "b", "--policies", "recency,bm25,full", "--refocus", "4,never"]
    options += ["--query_tokens", "3,6", "--samples", "3", "--predict", "10", "--device", "cpu"]
    assert evaluate.main([*options, "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert [(r["policy"], r["query_tokens"], r["refocus"], len(r["losses"])) for r in records] == [
        (name, query, refocus, 2)
        for refocus in (4, None)
        for name, query in (("recency", None), ("bm25", 3), ("bm25", 6), ("full", None))
    ]
    assert records[0]["against_recency"] == {"value": 0.0, "stderr": 0.0}
    said = capsys.readouterr()
    assert "warning: only 2 held-out documents have 97 tokens; 3 were requested" in said.err
    assert "policies that read all tokens before the horizon: bm25" in said.out
    assert evaluate.main([*options, "--refocus", "9", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: refocus = 9: ")
