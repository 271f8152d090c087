"""The benchmarks of LensNet and of the sampler, which need no launcher."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from bench.lens import MicroSteps

from mc_ds.config.cli import load_config
from tests.tools.test_bench_train import RECIPE


def run(folder: Path, name: str, *options: str, recipe: str = RECIPE) -> tuple[int, Any]:
    """The exit code, and the record."""
    config, record = folder / "recipe.yaml", folder / "out.jsonl"
    config.write_text(recipe)
    code = benchmark.main([name, "--json", str(record), "--config", str(config), *options])
    return code, json.loads(record.read_text()) if record.exists() else None


def test_lensnet_is_timed_for_each_number_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sequences", "1,3", "--steps", "3", "--warmup", "0", "--device", "cpu"]
    code, record = run(tmp_path, "lens", *options, "--train.precision", "fp32")
    assert code == 0
    assert [part["rows"] for part in record["measured"]] == [3, 9]
    assert (record["wc_length"], record["seq_len"]) == (48, 96)
    for part in record["measured"]:
        for phase in ("forward_ms", "loss_ms", "backward_ms"):
            times = part[phase]
            assert 0 < times["least"] <= times["median"] <= times["most"]
    assert "R =   9, eager: forward" in capsys.readouterr().out


def test_a_micro_step_is_that_of_training(tmp_path: Path) -> None:
    """All of LensNet that the loss reaches gets gradients, once its output layer is not zero."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load_config(["--config", str(tmp_path / "recipe.yaml"), "--train.precision", "fp32"])
    steps = MicroSteps(config, 2, torch.device("cpu"), fast=False)
    torch.nn.init.normal_(steps.lensnet.head_down.weight)
    steps.run()
    first = {
        name: p.grad.clone() for name, p in steps.lensnet.named_parameters() if p.grad is not None
    }
    assert {"head_down.weight", "project.weight", "index.project.weight"} <= first.keys()
    assert all(first[name].any() for name in ("project.weight", "index.project.weight"))
    steps.run()
    for name, parameter in steps.lensnet.named_parameters():
        if name in first:
            torch.testing.assert_close(parameter.grad, first[name])


def test_the_sampler_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, "sampler", "--steps", "4")
    assert code == 0
    assert (record["sequences"], record["rows"]) == (2, 6)
    assert record["entries_per_s"] == pytest.approx(6 * 48 * 1e3 / record["batch_ms"]["median"])
    assert 0 < record["variants_ms"]["least"] <= record["variants_ms"]["most"]
    assert "a micro-batch of 6 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lens", ["--sequences", "0"], "--sequences [0], --steps 20: each must be at least 1"),
        ("lens", ["--mc.num_random_variants", "0"], "trains no LensNet: use 2 or more"),
        ("sampler", ["--steps", "0"], "--steps = 0 must be at least 1"),
        ("sampler", ["--mc.num_random_variants", "0"], "has no variants to draw"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    name: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, record = run(tmp_path, name, *options)
    assert (code, record) == (2, None)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
