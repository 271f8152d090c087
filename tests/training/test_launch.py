"""`launch/train.py`: under every launcher, as a dry run, and with what it refuses."""

import json
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from launch.train import main
from mc_ds.config import RunConfig
from mc_ds.data import train_tokenizer
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.training.telemetry.source import source_commit
from tests.support.processes import launcher
from tests.support.tiny_run import environment, run, settings


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of two steps and returns its path."""

    def write(**changes):
        short = dict(
            train=dict(total_steps=2, warmup_steps=1),
            checkpoint=dict(interval=0),
            validation=dict(eval_interval=0),
        )
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings(tmp_path, "run", **short, **changes)))
        return path

    return write


@pytest.fixture
def no_ranks(monkeypatch):
    """No launcher's variables, and a failure where the ranks would meet."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def meet(*args, **kwargs):
        raise AssertionError("a process group was started")

    monkeypatch.setattr("mc_ds.training.loop.start_distributed", meet)


# Launchers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("deepspeed", [], 1),  # appends --local_rank
        ("torchrun", ["--standalone", "--nproc_per_node", "2"], 2),
        ("torchrun", ["--standalone"], 1),
    ],
    ids=["deepspeed", "torchrun", "torchrun-alone"],
)
def test_the_same_command_under_every_launcher(name, options, ranks, recipe, tmp_path):
    program = ["launch/train.py", "--config", recipe(), "--name", "launched"]
    done = run([*launcher(name), *options, *program], environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "launched"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["mc/lensnet_calls"]) for record in records] == [
        (1, 4 / ranks),
        (2, 8 / ranks),
    ]
    checkpoint = folder / "checkpoints" / "step_00000002"
    assert json.loads((checkpoint / "trainer.json").read_text())["world_size"] == ranks
    assert len(list(checkpoint.glob("*_optim_states.pt"))) == ranks
    assert "name: launched" in (folder / "config.yaml").read_text()


def test_a_run_says_what_it_is_in_ten_whole_lines(recipe, tmp_path):
    """On stderr, where no terminal is, and in the log with the time."""
    path = recipe(telemetry=dict(wandb=False, progress=True))
    command = [sys.executable, "launch/train.py", "--config", path]
    done = run(command, environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    said = done.stderr.splitlines()
    first = "\n".join(said[:10])
    for answer in (
        str(tmp_path / "runs" / "run"),
        "1 rank: 1 x CPU (1 thread)",
        "ZeRO-3, fp32",
        "2 steps of 4 sequences",
        "512 tokens; epochs of the data: corpus 0.0",
        "k parameters (embedding 9.6 k",
        "begins at step 0",
    ):
        assert answer in first
    assert re.search(r"^step 2/2 \(100%\)  loss \d\.\d{3}  .*left 0 s$", done.stderr, re.M)
    log = tmp_path / "runs" / "run" / "train.log"
    stamped = [
        re.fullmatch(r"[\d-]{10} [\d:]{8}  (.*)", line) for line in log.read_text().splitlines()
    ]
    assert [match[1] for match in stamped] == said

    go_on = run([*command, "--train.total_steps=3"], environment(tmp_path))
    assert go_on.returncode == 0, go_on.stderr
    assert "  changed: train.total_steps = 2 there, 3 here" in go_on.stderr.splitlines()
    assert log.read_text().count("run run in ") == 2


@pytest.mark.slow
def test_weights_and_biases_keeps_a_run_and_its_pictures_offline(recipe, tmp_path):
    """With the library itself: two starts are one run, with its config, commit and media."""
    path = recipe(telemetry=dict(wandb=True, wandb_group="of seeds"))
    command = [sys.executable, "launch/train.py", "--config", path]
    folders = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    environ = environment(tmp_path) | folders | {"WANDB_MODE": "offline"}
    folder = tmp_path / "runs" / "run"
    for steps in (2, 3):
        done = run([*command, f"--train.total_steps={steps}"], environ)
        assert done.returncode == 0, done.stderr
        assert "mirror is off" not in done.stderr
        (folder / "report.html").write_text("<html>all of it</html>")
        plt.imsave(folder / "eval_focus.png", np.zeros((2, 3)))
    first, resumed = sorted(folder.glob("wandb/offline-run-*"))
    number = (folder / "wandb_run_id.txt").read_text()
    assert first.name.endswith(f"-{number}")
    assert resumed.name.endswith(f"-{number}")
    for copy in (first, resumed):
        content = (copy / f"run-{number}.wandb").read_bytes()
        commit = source_commit()
        for known in ("train/loss", "of seeds", "training_lod2_probability", json.dumps(commit)):
            assert known.encode() in content, known
    media = {
        file.name.rpartition("_")[0].rpartition("_")[0] for file in resumed.rglob("media/**/*.*")
    }
    assert media == {"report", "eval_focus"}
    (page,) = resumed.rglob("media/**/*.html")
    assert "all of it" in page.read_text()


# Dry run


def printed_counts(text):
    table = text.split("# Parameters\n")[1].split("\n\n")[0]
    return {
        name: int(count.replace(",", ""))
        for name, count in re.findall(r"^(.*?) +([\d,]+)$", table, re.MULTILINE)
    }


@pytest.mark.parametrize(
    "changes", [{}, dict(backbone=dict(tie_embeddings=False)), dict(mc=dict(num_random_variants=0))]
)
def test_a_dry_run_counts_the_real_parameters_and_starts_nothing(
    changes, recipe, no_ranks, tmp_path, capsys
):
    path = recipe(**changes)
    before = sorted(tmp_path.iterdir())
    assert main(["--config", str(path), "--dry_run"]) == 0
    assert sorted(tmp_path.iterdir()) == before
    counts = printed_counts(capsys.readouterr().out)

    config = RunConfig.model_validate(json.loads(path.read_text()))
    model = MegaContextModel(config, vocab_size=300)
    lensnet = [LensNet(config.mc, dim=32)] if config.mc.num_random_variants else []
    real = sum(
        parameter.numel() for module in (model, *lensnet) for parameter in module.parameters()
    )
    assert counts.pop("total") == real == sum(counts.values())
    assert counts.get("lensnet", 0) == sum(
        parameter.numel() for module in lensnet for parameter in module.parameters()
    )
    assert ("head" in counts) == (not config.backbone.tie_embeddings)


def test_the_vocabulary_of_the_counts_is_the_recipes(recipe, no_ranks, capsys):
    assert main(["--config", str(recipe(data=dict(vocab_size=500))), "--dry_run"]) == 0
    assert printed_counts(capsys.readouterr().out)["embedding"] == 500 * 32


def test_a_dry_run_counts_with_the_vocabulary_of_a_given_tokenizer(
    recipe, no_ranks, tmp_path, capsys
):
    train_tokenizer(["a few words of no importance\n" * 40], 300).save(tmp_path)
    given = dict(tokenizer=str(tmp_path), vocab_size=500)
    assert main(["--config", str(recipe(data=given)), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert printed_counts(text)["embedding"] == 300 * 32
    assert "vocab_size: 300\n" in text
    assert main(["--config", str(recipe(data=given | dict(tokenizer="nowhere"))), "--dry_run"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mc.train_wc_length=41"], r"train_wc_length = 41 is not reachable .*: use 40 or 43"),
        (["--mc.gist_dim=33"], r"mc\.gist_dim: GistNet's width 33 cannot be split into 1 heads"),
        (["--train.global_batch_size=3", "--train.micro_batch_size=2"], r"is not a multiple of"),
        (["--deepspeed_config=nothing.json"], r"nothing\.json.*cannot read it"),
        (
            ["--data.vocab_size=60000"],
            r"data\.vocab_size = 60000: a tokenizer cannot be trained on this corpus",
        ),
        (
            ["--mc.seq_len=100000", "--mc.train_wc_length=99976"],
            r"the corpus has .* tokens, a sample needs 100001: use",
        ),
        (["--mc.block_sise=4"], r"unknown key --mc\.block_sise: did you mean --mc\.block_size"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(
    options, expected, recipe, no_ranks, tmp_path, monkeypatch, capsys
):
    environment(tmp_path)  # its small library is the corpus
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "library"))
    assert main(["--config", str(recipe()), *options]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{expected}.*\n", error)
    assert not (tmp_path / "runs").exists()


def test_a_partial_rank_environment_is_refused(recipe, no_ranks, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--config", str(recipe())]) == 2
    assert "WORLD_SIZE missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        (["--mc.train_wc_length", "41"], "use 40 or 43\n"),
        (["--resume", "/nowhere"], "use auto, never, or such a path\n"),
    ],
)
def test_the_exit_status_of_the_process(options, ending, recipe, tmp_path):
    done = run(
        [sys.executable, "launch/train.py", "--config", recipe(), *options], environment(tmp_path)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(ending)
    assert not any(path.is_file() for path in tmp_path.glob("runs/**/*"))
