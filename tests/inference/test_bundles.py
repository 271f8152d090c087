"""Bundles on the command line: text is continued, policies are compared by sessions, mistakes are
one line.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import generate
from mc_ds.config import ConfigError, FocusConfig
from mc_ds.data import train_tokenizer
from mc_ds.data.tokenizer.hf_json import HFTokenizer
from mc_ds.evaluation.measure import Evaluator
from mc_ds.evaluation.sessions import EVALUATED_POLICIES, Sessions
from mc_ds.evaluation.views import focus_lines
from mc_ds.inference import SESSION_POLICIES, InferenceModel, load_bundle
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.tasks import TaskSample
from tests.support.factories import VOCAB, mc_config, run_config, wake
from tests.support.optional import needs
from tests.support.processes import ROOT
from tests.support.sessions import batches, history, inference_model
from tests.support.tiny_bundle import write, write_bundle
from tests.support.tiny_run import environment
from tests.support.tiny_run import run as start

MC = mc_config()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "bundle", run_config(MC))[0]


def test_a_loaded_bundle_says_what_its_networks_say(tmp_path: Path) -> None:
    path, root, lensnet = write(tmp_path / "bundle", run_config(MC))
    model, direct = load_bundle(str(path)), InferenceModel(root, lensnet, run_config(MC))
    sessions = [net.session(policy="lens", budget=48, tree="ram") for net in (model, direct)]
    for session in sessions:
        session.ingest(history(120))
    assert sessions[0].nll([1, 2, 3]) == pytest.approx(sessions[1].nll([1, 2, 3]), abs=1e-6)
    assert sessions[0].generate(max_new_tokens=9, temperature=0.0) == sessions[1].generate(9)
    lods, starts = sessions[0].working_context()
    assert lods.dtype.kind == starts.dtype.kind == "i"
    assert model.session().settings.budget == MC.train_wc_length
    assert model.device.type == "cpu"
    with pytest.raises(ConfigError, match="is not a checkpoint, a run with one, a bundle"):
        load_bundle(tmp_path)


def test_a_bundle_in_bf16_is_served(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path / "bundle", run_config(MC), dtype="bf16")
    for dtype in (None, torch.bfloat16, torch.float32):
        model = load_bundle(path, dtype=dtype)
        session = model.session()
        session.ingest(history(130))
        assert np.isfinite(session.nll([1, 2]))
        assert len(session.generate(6, temperature=1.0)) == 6
        assert session.tree.shape.dtype == (dtype or torch.bfloat16)


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    code = generate.main([str(value) for value in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


@needs("bm25s")
def test_text_is_continued(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = " ".join(f"w{token % (VOCAB - 1)}" for token in history(70))
    (tmp_path / "prompt.txt").write_text(words)
    options = (
        "--bundle",
        bundle,
        "--max_new_tokens",
        7,
        "--temperature",
        1,
        "--seed",
        3,
        "--device",
        "cpu",
    )
    code, out, err = run(capsys, words, *options)
    assert code == 0
    assert 1 <= len(out.split()) <= 7
    assert set(out.split()) <= {f"w{number}" for number in range(VOCAB)}
    assert "history 7" in err  # 71 tokens and what was written
    assert run(capsys, "--prompt_file", tmp_path / "prompt.txt", *options)[1] == out
    monkeypatch.setattr(sys, "stdin", io.StringIO(words))
    assert run(capsys, *options)[1] == out
    for policy in SESSION_POLICIES:
        code, _, err = run(capsys, words, *options, "--policy", policy, "--show_focus")
        assert code == 0
        assert "before |" in err
        assert "after |" in err
    stop = out.split()[1]
    assert run(capsys, words, *options, "--stop", stop)[1].split() == out.split()[:1]


def test_a_tree_on_disk_is_continued_by_the_next_call(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--bundle",
        bundle,
        "--max_new_tokens",
        3,
        "--temperature",
        1,
        "--tree",
        tmp_path / "tree",
        "--device",
        "cpu",
    )
    _, _, first = run(capsys, "w1 w2 w3", *options)
    _, _, second = run(capsys, "w4", *options)
    said = [int(line.split("history ")[1]) for line in (first, second)]
    assert said[0] in (5, 6, 7)
    assert said[1] > said[0]
    assert (
        run(capsys, *options, "--prompt_file", "/dev/null")[0] == 0
    )  # nothing new, but a history to continue


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--policy", "newest"], "policy = 'newest'"),
        (["x", "--budget", "3"], "budget = 3"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--stop", ""], "stop = ''"),
        (["x", "--max_new_tokens", "-5"], "max_new_tokens = -5"),
        (["x", "--seed", "-1"], "seed = -1"),
        (["x", "--search", "-1"], "search = -1"),
        (["x", "--top_k", "0"], "top_k = 0"),
        (["", "--prompt_file", "/dev/null"], "no text"),
        (["x", "--prompt_file", "/nowhere/at/all"], "cannot be read"),
        (["x", "--tree", "/dev/null/tree"], "/dev/null"),
        (["caf\udce9"], "prompt: contains bytes that are not UTF-8"),
        (["x", "--device", "xyz"], "device = 'xyz'"),
        (["x", "--device", "meta"], "device = meta"),
        (["x", "--device", "cuda:99"], "device = cuda:99"),
    ],
)
def test_mistakes_are_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, out, err = run(capsys, "--bundle", bundle, "--device", "cpu", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    "argv",
    [
        ["x", "--max_new_tokens", "-5"],
        ["x", "--stop", ""],
        ["x", "--temperature", "-1"],
        ["x", "--top_p", "7"],
        ["x", "--policy", "newest"],
        ["x", "--prompt_file", "/nowhere/at/all"],
    ],
)
def test_a_mistake_changes_no_tree(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    tree = tmp_path / "tree"
    options = ["--bundle", bundle, "--device", "cpu", "--tree", tree]
    assert run(capsys, *argv, *options)[0] == 2
    assert not tree.exists()
    assert run(capsys, "w1 w2", *options, "--max_new_tokens", 0)[0] == 0
    before = {path.name: path.read_bytes() for path in tree.iterdir() if path.name != "lock"}
    assert run(capsys, *argv, *options)[0] == 2
    after = {path.name: path.read_bytes() for path in tree.iterdir() if path.name != "lock"}
    assert after == before


def test_nothing_is_made_where_there_is_nothing_to_continue(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--bundle", bundle, "--device", "cpu", "--prompt_file", "/dev/null")
    for tree in (tmp_path / "new", "ram"):
        code, _, err = run(capsys, *options, "--tree", tree)
        assert code == 2
        assert ("holds no tree" if tree != "ram" else "no text to continue") in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_no_text_is_refused(
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    errors: str,
) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", pipe)
    code, _, err = run(capsys, "--bundle", bundle, "--device", "cpu")
    assert code == 2
    assert err.startswith("error: prompt: ")
    assert err.count("\n") == 1
    assert "UTF-8" in err


def test_characters_that_a_pipe_cannot_take_are_replaced(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFTokenizer, "decode", lambda self, ids: "\u20ac" * len(ids))
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", pipe)
    options = ["--device", "cpu", "--max_new_tokens", "3"]
    assert generate.main(["w1 w2", "--bundle", str(bundle), *options]) == 0
    assert pipe.buffer.getvalue() in (b"?\n", b"??\n", b"???\n")  # type: ignore[attr-defined]


class Planted:
    """Random tokens with spans that matter, half of the horizon masked, and another question in the
    tail.
    """

    name = "planted"

    def sample(self, index: int, stage: int = 0) -> TaskSample:
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, VOCAB, MC.seq_len + 1)
        asked = tokens.copy()
        asked[-11:-6] = rng.integers(0, VOCAB, 5)
        mask = np.array([0, 1, 1, 0, 1], np.float32)
        span = 4 * rng.integers(0, 20)
        sample = [
            TaskSample(ids, mask, np.array([[span, span + 3]]), np.array([[0, 2]]), None)
            for ids in (tokens, asked)
        ]
        return TaskSample(tokens, mask, sample[0].spans, sample[0].distractors, sample[1])


@needs("bm25s")
def test_sessions_measure_what_batches_measure() -> None:
    """Every policy and budget, to the last figure, for any number of samples; drawings too."""
    net = inference_model()
    assert net.lensnet is not None
    focus, ids, budgets = FocusConfig(threshold=0.0), range(5), [0.5, 0.8]
    together = batches(net, focus=focus, seed=3)
    evaluator = Evaluator(together)
    with together.controller.inference():
        expected = evaluator.run(Planted(), EVALUATED_POLICIES, budgets, ids)
        alone = evaluator.run(Planted(), ["lens", "blind"], [0.5], [4])
        drawn = focus_lines(evaluator.contexts(Planted(), ["lens", "blind"], 0.5, 0))
    by_sessions = Evaluator(Sessions(model=net, mc=net.mc, focus=focus, seed=3))
    records = by_sessions.run(Planted(), EVALUATED_POLICIES, budgets, ids)
    assert [(r.policy, r.budget, r.wc_length, r.n) for r in records] == [
        (r.policy, r.budget, r.wc_length, r.n) for r in expected
    ]
    for mine, its in zip(records, expected, strict=True):
        np.testing.assert_allclose(mine.losses, its.losses, rtol=1e-4, err_msg=mine.policy)
        assert (mine.accuracy, mine.hit_rate, mine.distractor_rate) == (
            its.accuracy,
            its.hit_rate,
            its.distractor_rate,
        )
    mine_alone = by_sessions.run(Planted(), ["lens", "blind"], [0.5], [4])
    np.testing.assert_allclose([r.losses for r in mine_alone], [r.losses for r in alone], rtol=1e-4)
    assert mine_alone[0].losses != mine_alone[1].losses, "a sample alone is blind too"
    lines = focus_lines(by_sessions.contexts(Planted(), ["lens", "blind"], 0.5, 0))
    assert [line[: 17 + 23] for line in lines] == [
        line[: 17 + 23] for line in drawn
    ]  # the last of the 24 cells is the horizon's
    with pytest.raises(ConfigError, match="oracle"):
        by_sessions.run(Planted(), ["oracle"], budgets, ids)
    with pytest.raises(ConfigError, match="unknown"):
        by_sessions.run(Planted(), ["newest"], budgets, ids)


@pytest.mark.slow
def test_evaluation_by_sessions_writes_the_records_of_evaluation_in_batches(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    tokenizer = train_tokenizer(
        [path.read_text() for path in sorted((tmp_path / "library").glob("*.py"))], vocab_size=300
    )
    plain = run_config(MC)
    config = plain.model_validate(
        {**plain.model_dump(), "data": {"vocab_size": 300, "cache_dir": str(tmp_path / "cache")}}
    )
    torch.manual_seed(0)
    root, lensnet = MegaContextModel(config, vocab_size=300), wake(LensNet(MC, dim=32))
    state = root.state_dict() | {
        f"lensnet.{name}": value for name, value in lensnet.state_dict().items()
    }
    write_bundle(tmp_path / "bundle", config, tokenizer, state.items(), step=1, source="a test")
    options = [
        "--tasks",
        "corpus",
        "--samples",
        "4",
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--budgets",
        "0.5,0.7",
    ]
    records = []
    for source in ("--bundle", "--checkpoint"):
        out = tmp_path / f"{source[2:]}.json"
        command = [
            sys.executable,
            ROOT / "launch" / "evaluate.py",
            source,
            tmp_path / "bundle",
            "--out",
            out,
        ]
        done = start(
            [
                *command,
                *options,
                "--policies",
                "recency,random,lens,blind,full",
                "--show_focus",
                "1",
            ],
            variables,
        )
        assert done.returncode == 0, done.stderr
        assert "corpus, sequence 0, 48 entries for 96 tokens" in done.stdout
        records.append(json.loads(out.read_text()))
    for mine, its in zip(*records, strict=True):
        np.testing.assert_allclose(mine.pop("losses"), its.pop("losses"), rtol=1e-4)
        for name, value in its.items():
            assert mine[name] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            ), name
    done = start(
        [
            sys.executable,
            ROOT / "launch" / "evaluate.py",
            "--bundle",
            tmp_path / "bundle",
            "--policies",
            "oracle",
        ],
        variables,
    )
    assert done.returncode == 2
    assert "oracle" in done.stderr
    assert done.stderr.count("\n") == 1
