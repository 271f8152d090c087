"""The bundle that ships: it is whole and small, says how it was made, fits the recipe that starts
from it, and shows what LensNet does.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from launch import evaluate
from mc_ds.config.cli import load_config
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.layout import layout_of
from tests.support.processes import ROOT
from tests.support.tiny_run import environment, run

ASSET = ROOT / "assets" / "recall_small"
RECIPE = ROOT / "launch" / "recipes" / "recall" / "recall_cpu.yaml"


def test_it_is_whole_small_and_says_how_it_was_made() -> None:
    bundle = open_bundle(ASSET)
    assert {path.name for path in ASSET.iterdir()} == {
        *bundle.manifest["files"],
        "manifest.json",
    }, "nothing else ships"
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 8_000_000
    notes, card = bundle.manifest["notes"], (ASSET / "README.md").read_text()
    assert re.search(r"launch/train\.py --config launch/recipes/\w+/\w+\.yaml", notes["command"])
    assert re.fullmatch(r"[0-9a-f]{7,40}", notes["commit"])
    assert all(f"| {name} | {notes[name]} |" in card for name in ("command", "commit", "hardware"))
    named = re.findall(r"launch/recipes/\w+/\w+\.yaml", notes["command"])
    assert all((ROOT / recipe).exists() for recipe in named)


def test_the_recipe_takes_its_backbone_and_gistnet() -> None:
    bundle, config = open_bundle(ASSET, verify=False), load_config(["--config", str(RECIPE)])
    assert config.train.init_from == config.data.tokenizer == str(ASSET.relative_to(ROOT))
    assert config.train.init_parts == ["backbone", "gistnet"]
    wanted = layout_of(config, vocab_size=bundle.vocab_size).shapes
    there = bundle.parameters
    assert all(
        there[name] == shape for name, shape in wanted.items() if not name.startswith("lensnet.")
    )
    same = ("block_size", "max_lod", "position_scheme")
    assert all(getattr(config.mc, name) == getattr(bundle.config.mc, name) for name in same)
    assert config.backbone.model_dump(exclude={"init_std"}) == bundle.config.backbone.model_dump(
        exclude={"init_std"}
    )
    trained_at = {
        bundle.config.mc.train_wc_length,
        *(stage.train_wc_length for stage in bundle.config.mc.wc_schedule),
    }
    assert config.mc.train_wc_length in trained_at, (
        "positions go by place: another length is another model"
    )


def test_what_the_demo_says_of_it_is_so() -> None:
    config, said = open_bundle(ASSET, verify=False).config, (ROOT / "Makefile").read_text()
    facts = (
        f'{config.data.recall.facts_by_stage[-1]} facts "key=letters" stand in'
        f" {config.mc.seq_len:,} tokens"
    )
    assert facts in said
    assert f"room for {config.mc.train_wc_length} entries" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_it_opens_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """The demo's command, on this machine's standard library."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "recall.json"
    options = [
        "--tasks",
        "recall",
        "--questions",
        "3",
        "--policies",
        "recency,random,blind,lens",
        "--show_focus",
        "1",
        "--device",
        "cpu",
    ]
    assert (
        evaluate.main(["--bundle", str(ASSET), *options, "--seed", str(seed), "--out", str(out)])
        == 0
    )
    assert "the loss under lens is" in capsys.readouterr().out
    figures = {record["policy"]: record for record in json.loads(out.read_text())}
    loss = {policy: record["horizon_loss"] for policy, record in figures.items()}
    assert loss["lens"] <= 0.25 * min(loss["recency"], loss["random"])
    assert loss["blind"] >= 0.75 * min(loss["recency"], loss["random"]), (
        "without the question it cannot know"
    )
    assert figures["lens"]["hit_rate"] >= 0.9
    assert figures["blind"]["hit_rate"] <= 0.6


@pytest.mark.slow
def test_the_recipe_starts_from_it(tmp_path: Path) -> None:
    """Two steps; what all of them reach is measured by hand (docs/experiments/README.md)."""
    changes = {
        "out_dir": tmp_path / "runs",
        "data.cache_dir": tmp_path / "cache",
        "data.val_fraction": 0.3,  # of a small library
        "train.total_steps": 2,
        "mc.lens_warmup_steps": 1,
        "validation.eval_sequences": 2,
        "telemetry.wandb": "false",
        "telemetry.progress": "false",
    }
    options = [f"--{name}={value}" for name, value in changes.items()]
    done = run(
        [sys.executable, ROOT / "launch" / "train.py", "--config", RECIPE, *options],
        environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    records = [
        json.loads(line)
        for line in (tmp_path / "runs" / "recall_cpu" / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["mc/lens_step_applied"] == 1.0
    bundle = open_bundle(ASSET)
    before, after = records[0], records[-1]
    assert before["val/loss"] == after["val/loss"], "backbone and GistNet keep their weights"
    assert bundle.step > 0
