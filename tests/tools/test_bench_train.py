"""The benchmark of training steps: what it counts, and that its figures are of one another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mc_ds.config import RunConfig
from mc_ds.config.recipe import read_recipe
from tests.support.optional import needs
from tests.support.processes import ROOT, inherited
from tools.bench import train as bench_train

RECIPE = """
backbone: {dim: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 48}
mc: {seq_len: 96, block_size: 4, max_lod: 2, train_wc_length: 48, recent_tokens: 12,
     horizon_tokens: 5, num_random_variants: 2, lens_dim: 16, lens_heads: 2}
data: {vocab_size: 300, num_workers: 0}
train: {warmup_steps: 1, micro_batch_size: 2}
"""


def bench(tmp_path: Path, *options: str, recipe: str = RECIPE) -> list[dict]:
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = [sys.executable, "tools/bench/train.py", "--config", str(tmp_path / "recipe.yaml")]
    command += ["--json", str(tmp_path / "out.jsonl"), "--warmup", "1", "--steps", "2", *options]
    done = subprocess.run(command, cwd=ROOT, env=inherited(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_figures_are_of_the_steps_that_were_timed(tmp_path: Path) -> None:
    (record,) = bench(tmp_path, "--peak_tflops", "0.001")
    assert len(record["losses"]) == 3
    seconds, entries = record["step_ms"] / 1e3, 2 * 3 * 48
    assert record["entries_per_s"] == pytest.approx(entries / seconds)
    assert record["tokens_per_s"] == pytest.approx(2 * 96 / seconds)
    assert record["mfu"] > 0
    assert {"train/forward_ms", "mc/lens_forward_ms"} <= record["phases_ms"].keys()
    parts = record["start_parts_s"]
    assert list(parts) == ["imports", "process group", "model", "engine", "loader"]
    assert 0 < sum(parts.values()) < record["start_s"]
    assert (record["ranks"], record["zero_stage"], record["peer"]) == (1, 3, None)


def test_micro_steps_count_as_work_of_a_step(tmp_path: Path) -> None:
    (record,) = bench(tmp_path, "--accumulation", "3")
    assert record["accumulation"] == 3
    assert record["tokens_per_s"] == pytest.approx(3 * 2 * 96 / (record["step_ms"] / 1e3))


@needs("transformers")
@pytest.mark.parametrize("name", ["hugging_face", "fsdp2"])
def test_a_peer_has_the_same_number_of_parameters_and_learns(name: str, tmp_path: Path) -> None:
    recipe = RECIPE.replace("num_random_variants: 2", "num_random_variants: 0")
    options = ["--peer", name, "--train.learning_rate=0.01", "--accumulation", "2"]
    (record,) = bench(tmp_path, *options, recipe=recipe)
    assert record["peer"] == name
    assert record["losses"][-1] < record["losses"][0]
    assert record["peer_parameters"] == sum(record["parameters"].values())


def test_what_is_left_out_changes_no_loss(tmp_path: Path) -> None:
    whole = [part for part in bench_train.PARTS if part != "lens"]
    losses = []
    for number, options in enumerate(([], ["--without", *whole])):
        folder = tmp_path / str(number)
        folder.mkdir()
        losses.append(bench(folder, *options)[0]["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_step_of_several_ranks_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert bench_train.main(["--json", "x", "--each", "loss,step"]) == 2
    assert "step can be left out on one rank, not on 2" in capsys.readouterr().err
    assert bench_train.main(["--json", "x", "--each", "loss,stem"]) == 2
    assert "unknown parts ['stem']: use step, " in capsys.readouterr().err


def test_parts_are_left_out_in_turn_and_kernels_listed(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.txt"
    options = ["--each", "step,gradients", "lens", "loss", "--kernels", str(kernels)]
    records = bench(tmp_path, *options)
    assert [record["without"] for record in records] == [
        [],
        ["step", "gradients"],
        ["lens"],
        ["loss"],
    ]
    assert ["mc/lens_forward_ms" in record["phases_ms"] for record in records] == [
        True,
        True,
        False,
        True,
    ]
    total, *rows = kernels.read_text().splitlines()
    assert float(total.split()[0]) > 0
    assert len(rows) > 5


@pytest.mark.parametrize("path", sorted((ROOT / "tools/bench/shapes").glob("*.yaml")), ids=str)
def test_shapes_are_settings_of_a_run(path: Path) -> None:
    config = RunConfig.model_validate(read_recipe(str(path)))
    assert config.name == path.stem
    assert bench_train.weak_scaling(config, 4, 16).train.global_batch_size == (
        4 * config.train.micro_batch_size
    )
