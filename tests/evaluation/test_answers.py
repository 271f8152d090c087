"""Answers to prompts: exact budgets, scores of what sessions write, records on disk at once, and
figures by task.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import evaluate
from mc_ds.config import ConfigError, RetrievalConfig
from mc_ds.data import Domain, ShardWriter, StdlibCorpus, TokenShards
from mc_ds.evaluation.answers.answering import Answering
from mc_ds.evaluation.answers.records import ALL, AnswerRecord, Summary, answer_table, summaries
from mc_ds.evaluation.request import Request
from mc_ds.focus.policies import POLICIES
from mc_ds.inference import InferenceModel, Session, load_bundle
from mc_ds.tasks.prompts import PROMPTS, PromptTask, TextSource
from tests.support.optional import needs
from tests.support.processes import ROOT

BUNDLE = ROOT / "assets" / "recall_small"
LENGTH, BUDGETS = 1024, (0.5, 0.4)
NAMES = ["full", "recency", "bm25", "lens"]
TASKS = ["ruler_multikey_1", "ruler_fwe", "stories_1"]


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return load_bundle(BUNDLE, device="cpu")


@pytest.fixture(scope="module")
def source(model: InferenceModel, tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    assert model.tokenizer is not None
    documents = list(StdlibCorpus(val_fraction=0.05).documents("val"))[:20]
    folder, tokenizer = tmp_path_factory.mktemp("text") / "shards", model.tokenizer
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for document in documents:
            writer.append(tokenizer.encode_document(document))
    return TextSource(tokenizer, [Domain("corpus", 1.0, TokenShards(folder))])


def answering(
    model: InferenceModel, names: Sequence[str] = NAMES, batch_size: int = 1
) -> Answering:
    retrieval = RetrievalConfig(query_tokens=24)
    specs = [POLICIES[name].using(retrieval) for name in names]
    return Answering(model=model, specs=specs, budgets=BUDGETS, batch_size=batch_size)


def task(name: str, source: TextSource) -> PromptTask:
    return PromptTask(name, PROMPTS[name], source, seed=0)


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any]]:
    """Policy, budget and context of every generation; nothing is generated."""
    seen: list[tuple[str, int, Any]] = []

    def generate(_: InferenceModel, sessions: list[Session], *__: Any, **___: Any) -> Any:
        seen.extend((s.settings.policy, s.budget, s.working_context()) for s in sessions)
        return [[] for _ in sessions]

    monkeypatch.setattr(InferenceModel, "generate", generate)
    return seen


@needs("bm25s")
def test_all_policies_read_as_many_entries(
    model: InferenceModel, source: TextSource, contexts: list[tuple[str, int, Any]]
) -> None:
    records = list(answering(model).run(task("ruler_multikey_1", source), range(2), LENGTH))
    assert len(records) == len(contexts) == 2 * (1 + 3 * len(BUDGETS))
    inputs = LENGTH - 1 + model.mc.horizon_tokens
    geometry = model.mc.geometry.with_length(inputs)
    for record, (policy, _, (lods, starts)) in zip(records, contexts, strict=True):
        covered = int((model.mc.block_size**lods).sum())
        if record.policy == "full":
            assert (policy, len(lods), record.wc_length, record.budget) == (
                "recency",
                LENGTH,
                inputs,
                1.0,
            )
            continue
        assert policy == record.policy
        assert record.wc_length == geometry.reachable_at_most(record.budget * LENGTH)
        assert len(lods) == record.wc_length - model.mc.horizon_tokens + 1
        assert covered == (LENGTH if policy == "lens" else len(lods))
        assert starts[-1] == LENGTH - 1, "the question is read"
    assert len({record.wc_length for record in records}) == 1 + len(BUDGETS)


@needs("bm25s")
def test_hits_are_the_facts_that_are_open_when_the_answer_begins(
    model: InferenceModel, source: TextSource, contexts: list[tuple[str, int, Any]]
) -> None:
    asked = task("ruler_multikey_1", source)
    records = list(answering(model).run(asked, range(4), LENGTH))
    for record, (_, _, (lods, starts)) in zip(records, contexts, strict=True):
        prompt = asked.prompt(record.index, LENGTH)
        opened = set(starts[lods == 0].tolist())
        for spans, rate in (
            (prompt.spans, record.hit_rate),
            (prompt.distractors, record.distractor_rate),
        ):
            assert rate == np.mean([set(range(a, b)) <= opened for a, b in spans])
    assert {record.hit_rate for record in records if record.policy == "full"} == {1.0}
    frequent = answering(model, ["recency"]).run(task("ruler_fwe", source), [0], LENGTH)
    assert [record.hit_rate for record in frequent] == [None, None]


@needs("bm25s")
@pytest.mark.parametrize("name", TASKS)
def test_what_a_session_writes_is_scored(
    name: str, model: InferenceModel, source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, tokenizer = task(name, source), source.tokenizer
    prompt = asked.prompt(0, LENGTH)
    told: list[Any] = []
    wrong = [*prompt.wrong, "nothing"][0]

    def generate(
        _: InferenceModel,
        sessions: list[Session],
        count: int,
        *,
        stop: Sequence[str],
        stop_ids: Sequence[int],
    ) -> list[list[int]]:
        told.append((count, tuple(stop), tuple(stop_ids)))
        policy = sessions[0].settings.policy
        answers = prompt.answers[: len(prompt.answers) - (policy == "bm25")]
        text = wrong if policy == "lens" else ", ".join(answers) or wrong
        return [tokenizer.encode(f" {text}")]

    monkeypatch.setattr(InferenceModel, "generate", generate)
    records = {record.policy: record for record in answering(model).run(asked, [0], LENGTH)}
    ends = (tokenizer.separator_id,)
    assert set(told) == {(prompt.max_new_tokens, tuple(prompt.stop), ends)}
    missing = 1 - 1 / len(prompt.answers)
    scores = {policy: record.score for policy, record in records.items()}
    assert scores == pytest.approx({"full": 1.0, "recency": 1.0, "bm25": missing, "lens": 0.0})
    assert records["full"].answers == list(prompt.answers)
    assert records["full"].written == " " + ", ".join(prompt.answers)


def test_continuations_are_greedy_and_leave_the_prompt_as_it_is(
    model: InferenceModel, source: TextSource
) -> None:
    """The last policy writes what a session of its own writes."""
    asked = task("stories_1", source)
    prompt = asked.prompt(3, LENGTH)
    *_, last = answering(model, ["full", "lens", "recency"]).run(asked, [3], LENGTH)
    session = model.session("recency", last.wc_length)
    session.ingest(prompt.tokens)
    ends = source.tokenizer.separator_id
    written = session.generate(prompt.max_new_tokens, stop=prompt.stop, stop_ids=[ends])
    assert last.written == source.tokenizer.decode(written)
    assert len(written) > 0


@needs("bm25s")
def test_a_batch_gives_every_prompt_its_own_answer(
    model: InferenceModel, source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, limits = task("ruler_vt", source), []

    def generate(
        _: InferenceModel, sessions: list[Session], count: int, **__: Any
    ) -> list[list[int]]:
        """Each session writes what it has read, as if it wrote too much."""
        limits.append((len(sessions), count))
        assert len({session.settings.seed for session in sessions}) == len(sessions)
        written = [session.tree.tokens(len(session) - 200, len(session)) for session in sessions]
        for session in sessions:
            session.tree.append([1, 2, 3])
        return [tokens.tolist() for tokens in written]

    monkeypatch.setattr(InferenceModel, "generate", generate)
    found = {
        size: list(answering(model, ["full", "bm25"], size).run(asked, range(5), LENGTH))
        for size in (1, 3)
    }
    by_prompt = [
        sorted(records, key=lambda record: (record.index, record.policy, record.budget))
        for records in found.values()
    ]
    assert by_prompt[0] == by_prompt[1]
    assert [size for size, _ in limits[15:]] == [3] * 3 + [2] * 3
    prompts = [asked.prompt(index, LENGTH) for index in range(5)]
    assert limits[15][1] == max(prompt.max_new_tokens for prompt in prompts[:3])
    for record in by_prompt[1]:
        prompt = prompts[record.index]
        expected = prompt.tokens[-200:][: prompt.max_new_tokens]
        assert record.written == source.tokenizer.decode(expected)


def test_full_is_left_out_beyond_the_trained_length(
    model: InferenceModel, source: TextSource, contexts: list[tuple[str, int, Any]]
) -> None:
    reader, asked = answering(model, ["full", "recency"]), task("ruler_single_1", source)
    at = [[r.policy for r in reader.run(asked, [0], length)] for length in (LENGTH, LENGTH + 1)]
    assert at == [["full", "recency", "recency"], ["recency", "recency"]]
    assert len(contexts) == 5


# Figures


def record(index: int, policy: str, score: float, **changes: Any) -> AnswerRecord:
    given: dict[str, Any] = dict(
        task="ruler_vt",
        seq_len=4096,
        policy=policy,
        query_tokens=None,
        budget=1.0 if policy == "full" else 0.25,
        wc_length=1024,
        index=index,
        score=score,
        hit_rate=None,
        distractor_rate=None,
        answers=["a"],
        written="",
    )
    return AnswerRecord(**given | changes)


def figures() -> Iterator[AnswerRecord]:
    for index, (full, recency, bm25) in enumerate([(1, 0, 1), (1, 1, 0.5), (0, 0, 0), (1, 0, 0.5)]):
        yield record(index, "full", full)
        yield record(index, "recency", recency, hit_rate=recency)
        yield record(index, "bm25", bm25, query_tokens=16)
        yield record(index, "recency", 1, budget=0.125)
        yield record(index, "full", 1, task="ruler_fwe")
        yield record(index, "recency", 0.5, task="ruler_fwe")


def by_way(found: Sequence[Summary]) -> dict[tuple[str, str, float], Summary]:
    ways = {(s.setting.task, s.setting.policy, s.setting.budget): s for s in found}
    assert len(ways) == len(found)
    return ways


def test_figures_are_paired_with_recency_of_the_same_budget() -> None:
    found = by_way(summaries(list(figures())))
    bm25 = found["ruler_vt", "bm25", 0.25]
    assert bm25.score == pytest.approx((0.5, np.std([1, 0.5, 0, 0.5], ddof=1) / 2))
    assert bm25.of_full == pytest.approx(0.5 / 0.75)
    assert bm25.against_recency == pytest.approx((0.25, np.std([1, -0.5, 0, 0.5], ddof=1) / 2))
    assert (bm25.wins, bm25.losses, bm25.n, bm25.hit_rate) == (2, 1, 4, None)
    assert found["ruler_vt", "recency", 0.25].hit_rate == 0.25
    full = found["ruler_vt", "full", 1.0]
    assert (full.against_recency, full.wins, full.of_full) == (None, None, 1.0)
    assert found["ruler_vt", "recency", 0.125].of_full == pytest.approx(1 / 0.75)


def test_means_over_tasks_need_all_of_them() -> None:
    found = by_way(summaries(list(figures())))
    assert {way[1:] for way in found if way[0] == ALL} == {("full", 1.0), ("recency", 0.25)}
    recency = found[ALL, "recency", 0.25]
    assert recency.score.value == pytest.approx((0.25 + 0.5) / 2)
    assert recency.score.stderr == pytest.approx(0.25 / 2), "of one task, the other has no spread"
    assert recency.of_full == pytest.approx(0.375 / 0.875)
    assert (recency.wins, recency.losses, recency.n) == (0, 0, 8)
    one = [r for r in figures() if r.task == "ruler_vt"]
    assert ALL not in {summary.setting.task for summary in summaries(one)}


def test_a_single_prompt_has_no_error_and_absent_figures_are_dashes() -> None:
    lines = answer_table(summaries([record(0, "bm25", 0.5, query_tokens=16)])).splitlines()
    assert lines[0].split()[:5] == ["task", "seq_len", "policy", "query_tokens", "budget"]
    shown = ["ruler_vt", "4096", "bm25", "16", "0.25", "1024", "50.0", *"-----", "1"]
    assert lines[1].split() == shown
    full = by_way(summaries([record(0, "full", 0), record(0, "bm25", 0)]))
    assert full["ruler_vt", "bm25", 0.25].of_full is None, "no ratio to 0"


# The command


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory, where the encoded text is cached."""
    return tmp_path_factory.mktemp("cache")


def command(tmp_path: Path, *options: str) -> list[str]:
    out = ["--device", "cpu", "--out", str(tmp_path / "answers.jsonl")]
    return ["--bundle", str(BUNDLE), *out, *options]


@needs("bm25s")
def test_the_command_answers_prompts_of_the_shipped_model(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(cache)
    options = ["--tasks", "stories_1,stories_4", "--policies", "full,recency,bm25"]
    options += ["--retrieval_share", "0.25", "--neighbours", "0.5"]
    lengths = ["--seq_lens", "1024,1100", "--budgets", "0.5,0.25", "--samples", "1"]
    assert evaluate.main(command(tmp_path, *options, *lengths)) == 0
    shown = capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    ways = [(r["task"], r["seq_len"], r["policy"], r["budget"]) for r in records]
    assert len(set(ways)) == len(ways) == 2 * 5 + 2 * 4
    assert {way[1] for way in ways if way[2] == "full"} == {1024}
    assert "full is left out at 1100 tokens, since the model was trained on 1024" in shown.err
    assert shown.out.count("against_recency") == 2
    assert shown.out.count(ALL) == 5 + 4
    assert all(0 <= record["score"] <= 1 for record in records)
    chosen_by = {"share": 0.25, "neighbours": 0.5}
    for record in records:
        assert record["settings"] == (chosen_by if record["policy"] == "bm25" else {})
    assert shown.out.count("\nbm25 chooses blocks with share 0.25, neighbours 0.5\n") == 2


@needs("bm25s")
def test_records_are_on_disk_as_soon_as_they_are_measured(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    lines: list[int] = []
    out = tmp_path / "answers.jsonl"
    out.write_text("of another evaluation\n" * 9)

    def generate(_: InferenceModel, sessions: list[Session], *__: Any, **___: Any) -> Any:
        lines.append(len(out.read_text().splitlines()) if out.exists() else 0)
        if len(lines) == 4:
            raise ConfigError("the disk is full")
        return [[] for _ in sessions]

    monkeypatch.setattr(InferenceModel, "generate", generate)
    options = ["--tasks", "ruler_fwe", "--policies", "recency,bm25", "--samples", "3"]
    assert evaluate.main(command(tmp_path, *options, "--batch_size", "2")) == 2
    assert lines == [0, 2, 4, 5]
    assert len(out.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "ruler"], "task ruler_cwe: 1024 tokens are too few"),
        (["--tasks", "ruler_fwe", "--budgets", "0.01"], "the coarsest cover has 201 entries"),
        (
            ["--tasks", "ruler_fwe", "--policies", "oracle"],
            "--policies oracle: unknown: use recency",
        ),
        (["--tasks", "ruler_fwe,recall"], "evaluate them one after the other"),
        (["--tasks", "stories,ruler_fw"], "--tasks ruler_fw: unknown: use corpus, recall"),
        (["--tasks", "stories", "--refocus", "8"], "give --bundle, without --refocus"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_measured(
    options: list[str],
    message: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(cache)
    monkeypatch.setattr(InferenceModel, "generate", lambda *_, **__: sys.exit("generated"))
    assert evaluate.main(command(tmp_path, "--policies", "recency", *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "answers.jsonl").exists()


def test_groups_stand_for_their_tasks_and_checkpoints_cannot_answer(tmp_path: Path) -> None:
    request = Request.of(evaluate.parse(command(tmp_path, "--tasks", "stories,stories_2")))
    assert request.tasks == [f"stories_{kind}" for kind in range(1, 6)]
    assert request.prompts
    args = evaluate.parse(["--checkpoint", "x", "--tasks", "ruler", "--device", "cpu"])
    with pytest.raises(ConfigError, match="--tasks ruler_single_1: answers to prompts are written"):
        Request.of(args)
