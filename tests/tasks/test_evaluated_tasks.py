"""Tasks as a run has them in training, in validation and in an evaluation of other budgets,
lengths and numbers of questions.
"""

from typing import Any

import numpy as np
import pytest

from launch import evaluate
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.data import RECALL_TASKS, RecallConfig
from mc_ds.config.trained import with_history
from mc_ds.data import Domain, RunData, ShardWriter, StdlibCorpus, TokenShards, train_tokenizer
from mc_ds.evaluation.request import Request
from mc_ds.tasks import FAMILIES, PlantedTask, Task, open_blocks
from mc_ds.tasks.mixture import evaluated_task, make_source, run_task

T, TRAINED_W = 512, 302
LENGTHS = dict(
    seq_len=T,
    block_size=8,
    max_lod=1,
    train_wc_length=TRAINED_W,
    recent_tokens=72,
    horizon_tokens=24,
)
"""55 head blocks, of which W = 302 opens 25."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    documents = list(StdlibCorpus(val_fraction=0.05).documents("val"))[:30]
    tokenizer, folder = (
        train_tokenizer(documents, vocab_size=512),
        tmp_path_factory.mktemp("text") / "shards",
    )
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


def config(
    *, mc: dict[str, Any] | None = None, tasks: dict[str, float] | None = None, **recall: Any
) -> RunConfig:
    settings = RecallConfig(
        **{"facts_by_stage": [8, 52], "questions": 4, "min_questions": 1, **recall}
    )
    return RunConfig.model_validate(
        dict(
            mc={**LENGTHS, **(mc or {})}, data=dict(tasks=tasks or {"recall": 1.0}, recall=settings)
        )
    )


def evaluated(
    name: str,
    run: RunConfig,
    corpus: RunData,
    wc_length: int = TRAINED_W,
    as_trained: bool = True,
) -> PlantedTask:
    task = evaluated_task(
        name, run, corpus, corpus.val, seed=0, wc_length=wc_length, as_trained=as_trained
    )
    assert isinstance(task, PlantedTask)
    return task


def test_at_the_lengths_trained_on_the_run_decides(corpus: RunData) -> None:
    """The samples are those of validation, with fewer facts than the rule would have, or more."""
    for facts in (20, 52):
        run = config(facts_by_stage=[8, facts], planted=52)
        task, validated = (
            evaluated("recall", run, corpus),
            run_task("recall", run, corpus, corpus.val, seed=0),
        )
        assert task.facts_by_stage == (facts,)
        for index in range(4):
            assert np.array_equal(task.sample(index).tokens, validated.sample(index).tokens)
        assert evaluated("recall", run, corpus, wc_length=TRAINED_W - 70).facts_by_stage == (facts,)


def test_elsewhere_there_are_twice_as_many_facts_as_can_be_opened(corpus: RunData) -> None:
    run = config(facts_by_stage=[8, 20], planted=24)
    geometry = run.mc.geometry
    assert open_blocks(geometry, 309) == 26
    assert evaluated("recall", run, corpus, wc_length=309).facts_by_stage == (52,)
    assert evaluated("recall_hops2", run, corpus, wc_length=309).facts_by_stage == (52,)
    assert evaluated("recall", run, corpus, wc_length=400).facts_by_stage == (55,), (
        "one in every block where they do not suffice"
    )
    assert evaluated("recall_hops2", run, corpus, wc_length=400).facts_by_stage == (54,)
    longer = with_history(run, 1024)
    task = evaluated(
        "recall", longer, corpus, wc_length=longer.mc.train_wc_length, as_trained=False
    )
    assert task.facts_by_stage == (2 * open_blocks(longer.mc.geometry, longer.mc.train_wc_length),)
    assert longer.data.recall.facts_by_stage[-1] < task.facts_by_stage[0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RECALL_TASKS])
@pytest.mark.parametrize("wc_length", [288, 302, 309])
def test_the_other_tasks_follow_the_budget_asked_for(
    name: str, wc_length: int, corpus: RunData
) -> None:
    run = config(mc={"train_wc_length": 232})
    task, opened = evaluated(name, run, corpus, wc_length), open_blocks(run.mc.geometry, wc_length)
    facts, group = task.facts_by_stage[0], task.family.group_size
    wanted = max(2 * opened, 2 * task.family.min_facts)
    assert facts == (1 if name == "niah_single" else min(-(-wanted // group), 55 // group) * group)


def test_stages_of_the_training_that_an_evaluation_does_not_read_do_not_matter(
    corpus: RunData,
) -> None:
    """A first stage too small for two hops."""
    run = config(facts_by_stage=[4, 51], planted=52)
    with pytest.raises(ConfigError, match="4 facts do not fit: use 8"):
        run_task("recall_hops2", run, corpus, corpus.val, seed=0)
    assert evaluated("recall_hops2", run, corpus).facts_by_stage == (52,)
    odd = evaluated("recall_hops2", config(facts_by_stage=[4, 40], planted=51), corpus)
    assert (odd.facts_by_stage, odd.planted) == ((40,), 52), "whole chains"
    few = config(facts_by_stage=[4])
    assert evaluated("recall_hops2", few, corpus).facts_by_stage == (8,), (
        "as many as one question needs"
    )


def test_too_many_questions_are_answered_with_the_option_that_sets_them(
    corpus: RunData,
) -> None:
    run = config()
    with pytest.raises(
        ConfigError, match=r"^task recall_key3: 4 questions need .*: use --questions 3$"
    ) as error:
        evaluated("recall_key3", run, corpus)
    assert "horizon of 32 tokens" in str(error.value)
    assert "\n" not in str(error.value)
    assert evaluated("recall_key3", config(questions=3), corpus).facts_by_stage == (52,)
    short = config(mc={"horizon_tokens": 5})
    with pytest.raises(
        ConfigError, match=r"mc\.horizon_tokens = 5 cannot hold its answers: use at least 24"
    ):
        evaluated("recall", short, corpus)  # not one question fits


def made(name: str, corpus: RunData, budgets: str) -> Task:
    """The task as the command makes it."""
    evaluator: Any = None
    options = [
        "--bundle",
        "x",
        "--device",
        "cpu",
        "--out",
        str(corpus.val[0].shards.folder / "eval.json"),
        "--budgets",
        budgets,
    ]
    request = Request.of(evaluate.parse(options))
    return evaluate.make_task(
        name,
        evaluate.Subject(config(), True, corpus, [], evaluator, evaluator),
        request,
        request.budgets,
    )


def test_the_command_plants_for_its_largest_budget_and_warns_in_a_line(
    corpus: RunData, capsys: pytest.CaptureFixture[str]
) -> None:
    task = made("niah_multikey", corpus, "0.4,0.58,0.61")
    assert isinstance(task, PlantedTask)
    assert task.facts_by_stage == (2 * open_blocks(config().mc.geometry, 309),)
    assert capsys.readouterr().err == ""
    made("niah_multikey", corpus, "0.8,0.5")
    said = capsys.readouterr().err
    assert said.startswith("warning: task niah_multikey: 407 entries can open 40 of the 55 blocks")
    assert said.count("\n") == 1


def test_training_asks_as_it_did_and_validation_leaves_another_question(
    corpus: RunData,
) -> None:
    run = config(facts_by_stage=[12], tasks={"recall_hops2": 1.0})
    trained, validated = (
        make_source(run, corpus, corpus.val),
        run_task("recall_hops2", run, corpus, corpus.val, seed=run.seed),
    )
    asked = [int(trained.sample(index, 0).horizon_mask.sum()) // 4 for index in range(40)]
    left = [len(validated.sample(index).spans) // 2 for index in range(40)]
    assert set(asked) == {1, 2, 3, 4}
    assert left == [min(count, 3) for count in asked]
    assert all(validated.sample(index).other is not None for index in range(40))
