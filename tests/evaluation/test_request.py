"""The command line of the evaluation: mistakes are one line before any work, and what is asked for
is what is measured and drawn.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from launch import evaluate
from mc_ds.config import ConfigError, RetrievalConfig, RunConfig
from mc_ds.evaluation import report
from mc_ds.evaluation.records import Cell, Record
from mc_ds.evaluation.report import save_plots, series, table
from mc_ds.evaluation.request import Request
from tests.support.factories import mc_config, run_config
from tests.support.optional import needs
from tests.support.tiny_run import TIMEOUT_S

RUN = run_config(mc_config())


def request_of(*options: str, tmp_path: Path) -> Request:
    return Request.of(
        evaluate.parse(
            [
                "--checkpoint",
                "a_run",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "eval.json"),
                *options,
            ]
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "recall,nope"], "--tasks nope: unknown"),
        (["--tasks", ","], "--tasks is empty"),
        (["--policies", "lens,typo"], "--policies typo: unknown"),
        (["--budgets", "2"], "--budgets 2:"),
        (["--budgets", "0.5,0"], "--budgets 0:"),
        (["--budgets", "-0.5"], "--budgets -0.5:"),
        (["--budgets", "nan"], "--budgets nan:"),
        (["--budgets", "inf"], "--budgets inf:"),
        (["--budgets", "abc"], "--budgets abc:"),
        (["--seq_lens", "0"], "--seq_lens 0:"),
        (["--seq_lens", "1024.5"], "--seq_lens 1024.5:"),
        (["--samples", "0"], "--samples 0: use at least 1"),
        (["--batch_size", "-1"], "--batch_size -1:"),
        (["--questions", "0"], "--questions 0:"),
        (["--iterations", "0"], "--iterations 0:"),
        (["--show_focus", "-1"], "--show_focus -1: use at least 0"),
        (["--seed", "-1"], "--seed -1:"),
        (["--search", "0"], "--search 0: only inference sessions search: give --bundle"),
        (["--refocus", "8,often"], "--refocus often:"),
        (["--predict", "0"], "--predict 0:"),
        (["--query_tokens", "4,0"], "--query_tokens 0:"),
        (["--retrieval_share", "0"], "--retrieval_share 0:"),
        (["--lens_blocks", "0"], "--lens_blocks 0: use at least 1"),
        (["--neighbours", "-0.5"], "--neighbours -0.5: use 0 to 1"),
        (["--neighbours", "2"], "--neighbours 2: use 0 to 1"),
        (["--earlier_tokens", "-1"], "--earlier_tokens -1: use at least 0"),
        (["--neighbours", "nan"], "--neighbours nan: use 0 to 1"),
        (["--device", "foo"], "device = 'foo':"),
        (["--device", "cuda:99"], "device = cuda:99:"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = evaluate.main(
        [
            "--checkpoint",
            "/there/is/none",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "eval.json"),
            *options,
        ]
    )
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_place_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "eval.json"):
        assert (
            evaluate.main(["--checkpoint", "/there/is/none", "--device", "cpu", "--out", str(out)])
            == 2
        )
        assert capsys.readouterr().err.startswith(f"error: --out {out}")
    assert (
        evaluate.main(
            [
                "--checkpoint",
                "/there/is/none",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "new" / "eval.json"),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.startswith("error: /there/is/none does not exist: give ")


def test_what_is_named_twice_is_measured_once(tmp_path: Path) -> None:
    request = request_of(
        "--tasks",
        "corpus, recall,corpus",
        "--policies",
        " lens,recency, lens",
        "--budgets",
        "0.5,0.50,0.25",
        tmp_path=tmp_path,
    )
    assert (request.tasks, request.policies, request.budgets) == (
        ["corpus", "recall"],
        ["lens", "recency"],
        [0.5, 0.25],
    )
    assert request_of("--seq_lens", "64,96,64", tmp_path=tmp_path).seq_lens == [64, 96]


def test_a_model_without_lensnet_has_its_own_default_and_refuses_the_rest(tmp_path: Path) -> None:
    assert request_of(tmp_path=tmp_path).policies_for(RUN, has_lensnet=False) == ["recency", "full"]
    assert "lens" in request_of(tmp_path=tmp_path).policies_for(RUN, has_lensnet=True)
    assert "uniform" in request_of(tmp_path=tmp_path).policies_for(RUN, has_lensnet=True)
    no_gists = RUN.model_copy(update={"mc": RUN.mc.model_copy(update={"random_blocks": 2})})
    assert "uniform" not in request_of(tmp_path=tmp_path).policies_for(no_gists, has_lensnet=True)
    request = request_of("--policies", "recency,random", tmp_path=tmp_path)
    assert request.policies_for(RUN, has_lensnet=True) == ["recency", "random"]
    with pytest.raises(ConfigError, match="--policies random"):
        request.policies_for(RUN, has_lensnet=False)


def test_settings_of_focus_and_questions_arrive(tmp_path: Path) -> None:
    request = request_of(
        "--iterations", "2", "--memory", "off", "--questions", "5", tmp_path=tmp_path
    )
    focus = request.focus(RUN)
    assert (focus.iterations, focus.memory, focus.threshold) == (2, False, RUN.focus.threshold)
    drawn = RUN.model_copy(
        update={
            "data": RUN.data.model_copy(
                update={"recall": RUN.data.recall.model_copy(update={"min_questions": 1})}
            )
        }
    )
    recall = request.asking(drawn).data.recall
    assert (recall.questions, recall.min_questions) == (5, None)
    same = request_of(tmp_path=tmp_path)
    assert same.focus(RUN) == RUN.focus
    assert same.asking(drawn) == drawn
    assert same.asking(drawn).data.wordnet is None
    elsewhere = request_of("--wordnet", "/opt/wordnet", tmp_path=tmp_path).asking(drawn)
    assert (elsewhere.data.wordnet, elsewhere.data.recall) == ("/opt/wordnet", drawn.data.recall)


ALONE = RUN.model_copy(update={"mc": RUN.mc.model_copy(update={"random_blocks": 2})})
"""Of a model that reads tokens alone."""


def test_settings_of_the_choice_of_blocks_arrive(tmp_path: Path) -> None:
    options = ("--lens_blocks", "7", "--neighbours", "0.5", "--earlier_tokens", "8")
    request = request_of(*options, tmp_path=tmp_path)
    focus = request.focus(ALONE)
    assert (focus.lens_blocks, focus.neighbours, focus.earlier_tokens) == (7, 0.5, 8)
    assert [settings.neighbours for settings in request.retrieval(ALONE)] == [0.5]
    given = ALONE.model_copy(update={"focus": focus})
    assert request_of(tmp_path=tmp_path).focus(given) == focus
    none = request_of("--neighbours", "0", tmp_path=tmp_path).focus(given)
    assert (none.lens_blocks, none.neighbours) == (7, 0)


def test_settings_that_no_policy_would_read_are_refused(tmp_path: Path) -> None:
    """Of a model of covers, only retrieval chooses blocks one by one."""
    with pytest.raises(ConfigError, match="--lens_blocks 7: this model reads covers"):
        request_of("--lens_blocks", "7", tmp_path=tmp_path).focus(RUN)

    with pytest.raises(ConfigError, match="--earlier_tokens 8: this model reads covers"):
        request_of("--earlier_tokens", "8", tmp_path=tmp_path).focus(RUN)
    unread = request_of("--earlier_tokens", "8", "--policies", "recency,dense", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match="--earlier_tokens 8: none of the policies recency"):
        unread.policies_for(ALONE, has_lensnet=True)

    def check(policies: str, config: RunConfig) -> None:
        request = request_of("--neighbours", "0.5", "--policies", policies, tmp_path=tmp_path)
        request.policies_for(config, has_lensnet=True)

    for policies, config in (("recency,full", ALONE), ("recency,lens", RUN)):
        named = f"--neighbours 0.5: none of the policies {policies.replace(',', ', ')} scores"
        with pytest.raises(ConfigError, match=named):
            check(policies, config)
    check("recency,lens", ALONE)
    check("dense", RUN)
    assert request_of("--neighbours", "0.5", tmp_path=tmp_path).focus(RUN).neighbours == 0


@needs("bm25s")
def test_settings_of_retrieval_arrive(tmp_path: Path) -> None:
    options = ["--query_tokens", "4,16", "--retrieval_share", "1", "--retrieval_shape", "cover"]
    request = request_of(*options, tmp_path=tmp_path)
    assert request.retrieval(RUN) == [
        RetrievalConfig(query_tokens=n, share=1.0, shape="cover") for n in (4, 16)
    ]
    assert request_of(tmp_path=tmp_path).retrieval(RUN) == [RUN.retrieval]
    given = RUN.model_copy(update={"retrieval": RetrievalConfig(query_tokens=7, share=0.25)})
    assert request_of("--query_tokens", "3", tmp_path=tmp_path).retrieval(given) == [
        RetrievalConfig(query_tokens=3, share=0.25)
    ]
    request = request_of("--policies", "bm25", *options, tmp_path=tmp_path)
    assert request.policies_for(RUN, has_lensnet=True) == ["bm25"]
    with pytest.raises(ConfigError, match=r"--policies bm25: .*use --retrieval_shape blocks"):
        request.policies_for(RUN, has_lensnet=False)
    blocks = request_of("--policies", "bm25", tmp_path=tmp_path)
    assert blocks.policies_for(RUN, has_lensnet=False) == ["bm25"]


def test_a_package_that_is_missing_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    request = request_of("--policies", "recency,bm25", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match="bm25s package"):
        request.policies_for(RUN, has_lensnet=True)


def record(policy: str, budget: float, seq_len: int, loss: float, **figures: Any) -> Record:
    given: dict[str, Any] = dict(
        stderr=0.1,
        accuracy=0.5,
        hit_rate=None,
        hit_rates_by_hop=None,
        distractor_rate=None,
        n=2,
        losses=[loss],
        ids=[0],
    )
    return Record("a_task", policy, budget, int(budget * seq_len), seq_len, loss, **given | figures)


class Measured:
    """Stands in for an evaluator: a record per policy and budget."""

    def __init__(self, seq_len: int, calls: list[Any]) -> None:
        self.seq_len, self.calls = seq_len, calls

    def run(self, task: str, names: list[str], budgets: list[float], ids: range) -> list[Record]:
        self.calls.append((task, self.seq_len, names, budgets, ids))
        return [
            record(name, budget, self.seq_len, 1.0)
            for name in names
            if name != "other_question"
            for budget in budgets
        ]


def test_every_length_task_and_seed_that_is_asked_for_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    made: list[Any] = []

    @contextmanager
    def read(args: Any, request: Request, seq_len: int | None) -> Iterator[evaluate.Subject]:
        corpus: Any = type("Corpus", (), {"val": "shards"})
        evaluator: Any = Measured(seq_len or 96, calls)
        yield evaluate.Subject(
            RUN.model_copy(update={"mc": RUN.mc.model_copy(update={"seq_len": seq_len or 96})}),
            seq_len is None,
            corpus,
            request.policies_for(RUN, has_lensnet=True),
            evaluator,
            evaluator,
        )

    def task(name: str, *_: Any, **options: Any) -> Any:
        made.append((name, options["seed"], options["wc_length"], options["as_trained"]))
        return type("Task", (), {"name": name})

    monkeypatch.setattr(evaluate, "read_in_batches", read)
    monkeypatch.setattr(evaluate, "evaluated_task", task)
    options = [
        "--tasks",
        "corpus,recall",
        "--policies",
        "lens,other_question",
        "--budgets",
        "0.5,0.7",
        "--samples",
        "3",
        "--seed",
        "4",
    ]
    out = tmp_path / "eval.json"
    assert (
        evaluate.main(
            [
                "--checkpoint",
                "a_run",
                "--device",
                "cpu",
                "--seq_lens",
                "96,192",
                "--out",
                str(out),
                *options,
            ]
        )
        == 0
    )
    assert [(call[0].name, *call[1:]) for call in calls] == [
        (name, seq_len, ["lens", "other_question"], [0.5, 0.7], range(3))
        for seq_len in (96, 192)
        for name in ("corpus", "recall")
    ]
    longest = {t: RUN.mc.geometry.with_length(t).reachable_at_most(0.7 * t) for t in (96, 192)}
    assert made == [
        (name, 4, longest[t], False) for t in (96, 192) for name in ("corpus", "recall")
    ]
    captured = capsys.readouterr()
    assert "skipped policy other_question on task corpus" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {
        "eval.json",
        "eval_budget.png",
        "eval_history.png",
    }
    calls.clear()

    def failing(name: str, config: Any, *_: Any, **__: Any) -> Any:
        if config.mc.seq_len == 192:
            raise ConfigError("no room in 192 tokens")
        return task(name, seed=0, wc_length=0, as_trained=True)

    monkeypatch.setattr(evaluate, "evaluated_task", failing)
    out.unlink()
    assert (
        evaluate.main(
            [
                "--checkpoint",
                "a_run",
                "--device",
                "cpu",
                "--seq_lens",
                "96,192",
                "--out",
                str(out),
                *options,
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.splitlines()[-1] == "error: no room in 192 tokens"
    assert {r["seq_len"] for r in json.loads(out.read_text())} == {96}, "what was measured is kept"
    monkeypatch.setattr(evaluate, "evaluated_task", task)
    assert (
        evaluate.main(
            [
                "--checkpoint",
                "a_run",
                "--device",
                "cpu",
                "--out",
                str(out),
                "--policies",
                "other_question",
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing was measured")


class OneTask:
    """Stands in for an evaluator that measures the first task and then does something else."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then, self.measured = then, Measured(96, [])

    def run(self, task: str, names: list[str], budgets: list[float], ids: range) -> list[Record]:
        if self.measured.calls:
            self.then()
        return self.measured.run(task, names, budgets, ids)


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Evaluates two tasks into `eval.json`; `then` is done when the second one's turn comes."""

    def call(then: Callable[[], None]) -> int:
        @contextmanager
        def read(args: Any, request: Request, seq_len: int | None) -> Iterator[evaluate.Subject]:
            corpus: Any = type("Corpus", (), {"val": "shards"})
            evaluator: Any = OneTask(then)
            yield evaluate.Subject(RUN, True, corpus, ["lens"], evaluator, evaluator)

        monkeypatch.setattr(evaluate, "read_in_batches", read)
        monkeypatch.setattr(
            evaluate, "evaluated_task", lambda name, *_, **__: type("Task", (), {"name": name})
        )
        options = ["--tasks", "corpus,recall", "--policies", "lens", "--device", "cpu"]
        return evaluate.main(
            ["--checkpoint", "a_run", *options, "--out", str(tmp_path / "eval.json")]
        )

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_and_leaves_what_was_measured(
    number: signal.Signals, evaluation: Callable[..., int], tmp_path: Path
) -> None:
    said, second = tmp_path / "said", tmp_path / "second"

    def pause() -> None:
        second.touch()
        while True:  # `signal.pause` would miss a signal that comes before it
            time.sleep(0.01)

    def child() -> None:
        sys.stderr = said.open("w", buffering=1)
        evaluation(pause)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not second.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid or 0, number)
        process.join(TIMEOUT_S)
        assert process.exitcode == 128 + number
    finally:
        process.kill()
        process.join()
    (line,) = said.read_text().splitlines()
    assert line.startswith(
        f"{number.name} received: the evaluation ends; records of the finished tasks"
    )
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 1


def test_out_of_memory_is_one_line_and_leaves_what_was_measured(
    evaluation: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    assert evaluation(exhaust) == 2
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2 GiB.\n"
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        evaluation(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_records_are_on_disk_before_anything_is_printed_of_them(
    evaluation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unprintable(records: Any) -> str:
        raise UnicodeEncodeError("latin-1", "x", 0, 1, "not in range")

    monkeypatch.setattr(evaluate, "table", unprintable)
    with pytest.raises(UnicodeEncodeError):
        evaluation(lambda: None)
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 2


def test_a_length_that_cannot_be_had_is_refused_before_another_is_measured(tmp_path: Path) -> None:
    request_of("--seq_lens", "96,192", "--budgets", "0.5", tmp_path=tmp_path).check_lengths(RUN)
    with pytest.raises(ValueError, match="20 tokens"):
        request_of("--seq_lens", "96,20", tmp_path=tmp_path).check_lengths(RUN)
    with pytest.raises(ValueError, match="cannot cover"):
        request_of("--budgets", "0.5,0.05", tmp_path=tmp_path).check_lengths(RUN)


RECORDS = [
    record(p, b, t, loss=b + t / 1000)
    for t in (1024, 768)
    for p in ("recency", "lens")
    for b in (0.7, 0.3)
]
RECORDS += [record("full", 1.0, t, t / 500) for t in (1024, 768)]


def test_a_line_of_a_plot_is_of_one_policy_and_one_length_or_budget() -> None:
    by_budget = series(RECORDS, "budget")
    assert list(by_budget) == [
        f"{p}, {t} tokens" for p in ("recency", "lens", "full") for t in (1024, 768)
    ]
    assert [(r.budget, r.seq_len) for r in by_budget["lens, 768 tokens"]] == [
        (0.3, 768),
        (0.7, 768),
    ]
    by_length = series(RECORDS, "seq_len")
    assert list(by_length) == ["recency, 0.7", "recency, 0.3", "lens, 0.7", "lens, 0.3", "full"]
    assert [(r.budget, r.seq_len) for r in by_length["recency, 0.3"]] == [(0.3, 768), (0.3, 1024)]
    assert list(series([r for r in RECORDS if r.seq_len == 768], "budget")) == [
        "recency",
        "lens",
        "full",
    ]
    bounds = [r for r in RECORDS if r.policy == "full"]
    assert list(series(bounds, "budget")) == ["full, 1024 tokens", "full, 768 tokens"]
    assert [r.seq_len for r in series(bounds, "seq_len")["full"]] == [768, 1024]


def test_plots_show_the_loss_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    one = [
        record("lens", b, 1024, loss=3 * b, stderr=e, accuracy=0.9)
        for b, e in ((0.5, 0.25), (0.25, None))
    ]
    assert [path.name for path in save_plots(one, tmp_path / "eval")] == ["eval_budget.png"]
    (panel,) = figures[0].axes
    (container,) = panel.containers
    np.testing.assert_allclose(container.lines[0].get_xydata(), [[0.25, 0.75], [0.5, 1.5]])
    bars = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.75, 0.75], [1.25, 1.75]])
    plt.close("all")


def test_a_single_sequence_has_no_standard_error() -> None:
    cell = Cell()
    cell.losses = [1.0]
    alone = cell.record("corpus", "lens", 0.5, 48, 96)
    assert alone.stderr is None
    assert "-" in table([alone]).splitlines()[1].split()
    cell.losses = [1.0, 2.0]
    two = cell.record("corpus", "lens", 0.5, 48, 96)
    assert two.stderr == pytest.approx(0.5)
