"""A trained model is the same whether it is loaded from its run or from the run's bundle:
networks, corpus and losses.
"""

import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.evaluation.batches import Batches
from mc_ds.evaluation.measure import Evaluator
from mc_ds.tasks.mixture import run_task
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.export import export_bundle
from mc_ds.weights.open import load_trained
from tests.support.processes import ROOT
from tests.support.tiny_run import Runs, edit_trainer, environment

CPU = torch.device("cpu")
CACHE = "/dev/null/cache"
"""A folder of another machine that nobody can make here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of two ranks under ZeRO-3, and its bundle."""
    runs = Runs(tmp_path_factory.mktemp("trained"))
    quiet = dict(validation=dict(eval_interval=2), checkpoint=dict(interval=2))
    runs.work(2, [runs.scenario("whole", train=dict(total_steps=4), **quiet)])
    folder = runs.folder / "runs" / "whole"
    export_bundle(folder, folder.parent / "bundle")
    return folder


@pytest.fixture
def library(run):
    """What the run's processes took for the standard library."""
    return run.parents[1] / "library"


@contextmanager
def sysconfig_of(library):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name, *_: {"stdlib": str(library)}[name])
        yield


def records(trained):
    """Losses of every sequence under several policies."""
    mc = trained.config.mc
    evaluator = Evaluator(
        Batches(
            forward=trained.model,
            mc=mc,
            controller=trained.controller,
            focus=trained.config.focus,
            seed=0,
            batch_size=2,
            device=CPU,
        )
    )
    task = run_task("corpus", trained.config, trained.corpus, trained.corpus.val, seed=0)
    with trained.controller.inference():
        found = evaluator.run(
            task, ["recency", "random", "lens", "full"], [mc.train_wc_length / mc.seq_len], range(3)
        )
    return {record.policy: record.losses for record in found}


@pytest.mark.parametrize("seq_len", [None, 96])
def test_run_and_bundle_give_the_same_losses(run, library, seq_len):
    with sysconfig_of(library):
        source, bundle = (
            load_trained(str(path), device=CPU, seq_len=seq_len)
            for path in (run, run.parent / "bundle")
        )
    assert source.step == bundle.step
    for section in ("name", "seed", "mc", "backbone", "focus", "train"):
        assert getattr(source.config, section) == getattr(bundle.config, section)
    assert str(run.parents[1]) not in bundle.config.model_dump_json()  # where the run lay
    assert bundle.config.mc.seq_len == (seq_len or 64)
    assert bundle.corpus.tokenizer.sha256 == source.corpus.tokenizer.sha256
    assert records(bundle) == records(source)
    assert not any(
        module.training for module in (bundle.model, bundle.lensnet, source.model, source.lensnet)
    )


@pytest.fixture
def elsewhere(run, library, tmp_path, monkeypatch):
    """The run on another machine: its cache is gone, and the library another, on which another
    tokenizer would be trained.
    """
    shutil.copytree(library, tmp_path / "library")
    (tmp_path / "library" / "more.py").write_text("unheard = 'of'\n" * 50)
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "run")
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        edit_trainer(checkpoint, lambda t: t["config"]["data"].update(cache_dir=CACHE))
    with sysconfig_of(tmp_path / "library"):
        yield copy


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_another_machine_reads_its_own_corpus_with_the_same_tokenizer(
    run, elsewhere, kind, capsys, tmp_path
):
    path = elsewhere if kind == "run" else run.parent / "bundle"
    trained = load_trained(str(path), device=CPU)
    assert trained.corpus.tokenizer.content() == (run / "tokenizer.model").read_bytes()
    assert all(len(d.shards) > 0 for d in (*trained.corpus.train, *trained.corpus.val))
    assert trained.corpus.cache.resolve().is_relative_to(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "the text of Python's library is not that of the training" in line


def test_the_text_of_the_training_is_not_remarked_on(run, library, tmp_path, monkeypatch, capsys):
    """Also where it is encoded anew."""
    monkeypatch.chdir(tmp_path)
    with sysconfig_of(library):
        for path in (run, run.parent / "bundle"):
            load_trained(str(path), device=CPU)
    assert capsys.readouterr().err == ""


def test_a_run_without_its_tokenizer_finds_it_in_the_cache_or_not_at_all(run, elsewhere, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for folder in (copy, elsewhere):
        (folder / "tokenizer.model").unlink()
    assert (
        open_bundle(export_bundle(copy, tmp_path / "bundle")).tokenizer().content()
        == (run / "tokenizer.model").read_bytes()
    )
    with pytest.raises(ConfigError, match="cannot be rebuilt, since its corpus has changed"):
        export_bundle(elsewhere, tmp_path / "other")


def test_the_card_has_the_validation_of_the_checkpoint(run, tmp_path):
    older = export_bundle(run / "checkpoints" / "step_00000002", tmp_path / "older")
    cards = [(folder / "README.md").read_text() for folder in (older, run.parent / "bundle")]
    figures = [next(line for line in card.splitlines() if "`val/loss`" in line) for card in cards]
    assert figures[0] != figures[1]
    assert [
        "step_00000002" in cards[0],
        "step_00000004" in cards[1],
        "ZeRO-3 on 2 ranks" in cards[1],
    ] == [True] * 3


def test_what_cannot_be_loaded(run, tmp_path):
    with pytest.raises(ConfigError, match="is not a checkpoint, a run with one, a bundle"):
        load_trained(str(tmp_path), device=CPU)
    broken = shutil.copytree(run.parent / "bundle", tmp_path / "broken")
    next(broken.glob("gistnet-*")).unlink()
    with pytest.raises(
        ConfigError, match=r"bundle .* is damaged: gistnet-00001-of-00001.safetensors is missing"
    ):
        load_trained(str(broken), device=CPU)


WITHOUT_AN_ENGINE = """
import sys
sys.path.insert(0, "launch")
import evaluate, generate
from tools import convert_checkpoint, import_hf
run, bundle, out = sys.argv[1:]
few = ["--tasks", "corpus", "--policies", "recency,lens", "--samples", "2", "--device", "cpu", "--out", f"{out}/records.json"]
assert evaluate.main(["--checkpoint", run, *few]) == 0
assert evaluate.main(["--bundle", bundle, *few]) == 0
assert convert_checkpoint.main([run, f"{out}/bundle"]) == 0
assert generate.main(["--bundle", bundle, "--device", "cpu", "--max_new_tokens", "2", "a = b"]) == 0
training = ("deepspeed", "mc_ds.training")
sys.exit(sorted(name for name in sys.modules if name.startswith(training)) or 0)
"""


def test_evaluating_converting_and_serving_import_neither_training_nor_deepspeed(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AN_ENGINE, run, run.parent / "bundle", tmp_path],
        cwd=ROOT,
        env=environment(run.parents[1]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
