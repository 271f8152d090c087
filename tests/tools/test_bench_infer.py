"""The benchmark of decoding: both sides have the same weights, and figures are of one another."""

import json
from pathlib import Path

import benchmark
import pytest
import torch

from mc_ds.inference import InferenceModel
from tests.support.factories import model, run_config
from tests.support.optional import needs
from tools.bench import infer

RECIPE = """
backbone: {dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_dim: 32, init_std: 0.3}
mc: {seq_len: 96, block_size: 4, max_lod: 2, train_wc_length: 48, recent_tokens: 12,
     horizon_tokens: 5, lens_dim: 16, lens_heads: 2}
data: {vocab_size: 300}
train: {warmup_steps: 1}
"""


def options(folder: Path, *others: str) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    source = ["--random_weights", str(folder / "recipe.yaml"), "--device", "cpu"]
    sizes = ["--histories", "150,600", "--budget", "60", "--tokens", "8", "--repeats", "2"]
    return [*source, *sizes, *others]


@needs("transformers")
def test_sessions_are_timed_beside_transformers(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["infer", "--json", str(out), *options(tmp_path, "--peers", "dynamic,static")]
    assert benchmark.main(arguments) == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert list(record["runs"]) == ["dynamic", "static", "session, 150", "session, 600"]
    assert record["largest_loss_difference"] < 1e-4
    for run in record["runs"].values():
        low, high = run["token_ms_min_max"]
        assert 0 < low <= run["token_ms"] <= high
        assert run["tokens_per_s"] == pytest.approx(1e3 / run["token_ms"])
        assert min(run["token_ms"], run["first_token_ms"]) < run["token_ms_with_first"]
        assert run["token_ms_with_first"] < max(run["token_ms"], run["first_token_ms"])
    for name in ("session, 150", "session, 600"):
        phases = record["runs"][name]["phase_ms_per_token"]
        assert phases["decode"] > 0
        assert phases["lens"] > 0, "at K = 4 tokens per refocus, 8 tokens include one"
    assert record["runs"]["session, 600"]["phase_ms_per_token"]["search"] > 0
    assert max(record["entries"]) <= 60
    assert {"torch", "transformers", "python", "mc_ds"} == record["versions"].keys()


@needs("transformers")
@pytest.mark.parametrize("tied", [False, True])
def test_the_peer_has_the_weights_of_the_backbone(tied: bool) -> None:
    """Its losses are ours, and are no longer once a weight of it changes."""
    config = run_config(backbone=dict(init_std=0.3, tie_embeddings=tied))
    ours = InferenceModel(model(config), None, config)
    llama = infer.transformers_llama(ours.model, 100)
    assert infer.loss_difference(ours, llama, 50, seed=0) < 1e-4
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0] += 1
    assert infer.loss_difference(ours, llama, 50, seed=0) > 1e-3


def test_every_interval_between_refocuses_is_measured(tmp_path: Path) -> None:
    """Also those for which the model's contexts have no room, h = 5."""
    out = tmp_path / "out.jsonl"
    sizes = ["--peers", "", "--histories", "150", "--tokens", "16", "--refocus", "2,8"]
    assert benchmark.main(["infer", "--json", str(out), *options(tmp_path), *sizes]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["session, 150, r = 2", "session, 150, r = 8"]
    for run in runs.values():
        parts = run["phase_ms_per_token"]
        focus = sum(value for name, value in parts.items() if name != "decode")
        assert run["focus_share_of_decoding"] == pytest.approx(focus / parts["decode"], rel=0.5)


def test_a_model_with_more_room_differs_in_that_alone(tmp_path: Path) -> None:
    net = infer.read_model(infer.parse([*options(tmp_path), "--json", "unused"]))
    assert infer.with_room(net, 5) is net
    longer, before = infer.with_room(net, 8).mc, net.mc
    assert longer.horizon_tokens == 8
    tail = before.recent_tokens - before.horizon_tokens
    assert longer.recent_tokens - longer.horizon_tokens == tail
    assert net.mc == before
    session = infer.with_room(net, 8).session("lens", 60, refocus=8)
    session.ingest(infer.random_tokens(net, 150, 0))
    chosen = [session.reader.context for _ in session.stream(17)]
    assert {context.window.known for context in chosen if context} == {150, 158, 166}


def test_every_repetition_continues_the_same_history(tmp_path: Path) -> None:
    """Generations append tokens, which the next repetition must not read."""
    args = infer.parse([*options(tmp_path), "--json", "unused"])
    net = infer.read_model(args)
    session = net.session("lens", 60)
    session.ingest(infer.random_tokens(net, 150, 0))
    run = infer.session_run(session, 150, 8)
    said = []
    for _ in range(2):
        run()
        assert len(session) == 150 + 9
        said.append(session.tree.tokens(150, 159).tolist())
    assert said[0] == said[1]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = ["--json", str(tmp_path / "out.jsonl")]
    assert infer.main([*options(tmp_path, "--peers", "paged"), *json_file]) == 2
    assert "--peers paged: use dynamic or static" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
