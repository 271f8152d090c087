"""The benchmark's needles are where it says, and its figures are of the sessions that it names."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mc_ds.config import MCConfig
from mc_ds.data import Domain, RunData, ShardWriter, StdlibCorpus, TokenShards, train_tokenizer
from mc_ds.inference import InferenceModel
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.tasks import TaskVocabulary
from tests.support.factories import run_config, wake
from tools.bench import inference as bench_inference

RECIPE = """
backbone: {dim: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 32}
mc: {seq_len: 96, block_size: 4, max_lod: 2, train_wc_length: 48, recent_tokens: 12, horizon_tokens: 5, lens_dim: 16, lens_heads: 2}
data: {vocab_size: 300}
train: {warmup_steps: 1}
"""


def arguments(*argv: Any) -> list[str]:
    return [str(value) for value in argv]


def test_latency_of_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = (
        "--histories",
        "150,600",
        "--budget",
        60,
        "--tokens",
        12,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out.json",
    )
    code = bench_inference.main(
        arguments(
            "--random_weights", tmp_path / "recipe.yaml", *options, "--tree", tmp_path / "trees"
        )
    )
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [record["history"] for record in result["latency"]] == [150, 600]
    assert len(capsys.readouterr().out.splitlines()) == 3
    for record in result["latency"]:
        assert record["entries"] <= 60
        assert record["token_ms_median"] <= record["token_ms_largest"]
        assert sum(record["phase_ms_per_token"].values()) == pytest.approx(
            record["token_ms"], rel=0.5
        )
        assert 0 < record["focus_share"] < 1
    assert result["needles"] == []
    assert (
        bench_inference.main(
            arguments(
                "--random_weights", tmp_path / "recipe.yaml", *options, "--tree", tmp_path / "trees"
            )
        )
        == 2
    )
    assert "give a new folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    documents = list(StdlibCorpus(val_fraction=0.05).documents("val"))[:30]
    tokenizer = train_tokenizer(documents, vocab_size=512)
    folder = tmp_path_factory.mktemp("shards") / "train"
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for document in documents:
            writer.append(tokenizer.encode_document(document))
    shards = TokenShards(folder)
    domains = (Domain("corpus", 1.0, shards),)
    return RunData(
        title="",
        identity="",
        fingerprint="",
        tokenizer=tokenizer,
        cache=folder,
        train=domains,
        val=domains,
    )


def test_needles_are_found_where_the_context_is_open(prepared: RunData) -> None:
    mc = MCConfig(
        seq_len=512,
        block_size=8,
        max_lod=2,
        train_wc_length=302,
        recent_tokens=64,
        horizon_tokens=24,
        lens_dim=32,
        lens_heads=2,
    )
    config = run_config(mc)
    torch.manual_seed(0)
    lensnet = wake(LensNet(mc, dim=32))
    model = InferenceModel(MegaContextModel(config, vocab_size=512), lensnet, config)
    args = SimpleNamespace(
        needles=40,
        questions=2,
        asks=6,
        texts=2,
        seed=1,
        policies="lens,lens_no_search,blind,uniform,recency",
        budget=250,
        search=None,
    )
    haystack = bench_inference.Haystack(model, prepared, 2000, 0, args)
    vocabulary = TaskVocabulary.of(prepared.tokenizer)
    spans, question, answers, is_value = haystack.ask(np.random.default_rng(0))
    assert len(haystack.tokens) == 2000 - 24 + 1 - 4
    for number, (start, stop) in enumerate(spans):
        fact = haystack.tokens[start:stop].tolist()
        assert fact == answers[6 * number : 6 * number + 6]
        assert fact[1] == vocabulary.equals
        assert question[1 + number] == fact[0]
        assert start // 8 == (stop - 1) // 8
    assert is_value == [False, False, True, True, True, True] * 2
    records = {
        record["policy"]: record for record in bench_inference.needles(model, prepared, 2000, args)
    }
    assert list(records) == args.policies.split(",")
    assert all(record["asked"] == 2 * 2 * 6 for record in records.values())
    # 226 tokens are read of 2000 by recency, and all of them when the budget allows it.
    assert 0 <= records["recency"]["found"] < 0.4
    args.budget, args.policies = 2100, "recency,lens"
    assert [record["found"] for record in bench_inference.needles(model, prepared, 2000, args)] == [
        1.0,
        1.0,
    ]
