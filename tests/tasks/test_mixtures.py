"""A run's mixture of tasks over several datasets: the same tokens for any ranks and workers, every
window of each dataset once per its epoch.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mc_ds
from mc_ds.config import RunConfig
from mc_ds.data import MicroBatchDataset, MicroStep, RunData, WindowSampler, make_loader, open_data
from mc_ds.data.sampling.interleave import BLOCK
from mc_ds.data.tokenizer import Tokenizer, train_tokenizer
from mc_ds.tasks import DomainsTask
from mc_ds.tasks.mixture import evaluated_task, make_source, reading_lines, text_sources
from tests.support.datasets import WORDS, write_dataset
from tests.support.factories import mc_config

MC = mc_config(seq_len=64, train_wc_length=40)
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_dataset(folder / "books", tokenizer)
    write_dataset(folder / "code", tokenizer, WORDS[20:50])
    return folder


def config(folder: Path, **data: Any) -> RunConfig:
    datasets = [
        dict(path=str(folder / name), weight=w) for name, w in (("books", 0.9), ("code", 0.1))
    ]
    settings = dict(datasets=datasets, cache_dir=str(folder / "cache"), **data)
    return RunConfig.model_validate(dict(mc=MC.model_dump(), data=settings, seed=4))


def opened(run: RunConfig) -> tuple[RunConfig, RunData]:
    return run, open_data(run.data)


def steps_of(run: RunConfig, data: RunData, *, ranks: int, workers: int) -> list[list[list[int]]]:
    """The sequences of six steps, by global index, as that many ranks read them."""
    source = make_source(run, data, data.train)
    accumulation = GLOBAL_BATCH // 2 // ranks
    steps: list[list[list[int]]] = [[] for _ in range(6)]
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        dataset = MicroBatchDataset(
            source,
            run.mc,
            seed=run.seed,
            micro_batch_size=2,
            rank=rank,
            world_size=ranks,
            accumulation_steps=accumulation,
        )
        identities = [MicroStep(s, m, 40, 0) for s in range(6) for m in range(accumulation)]
        for batch in make_loader(dataset, identities, num_workers=workers, pin_memory=False):
            for index, tokens in zip(batch.sample_ids.tolist(), batch.tokens, strict=True):
                found[index] = tokens.tolist()
    for index in sorted(found):
        steps[index // GLOBAL_BATCH].append(found[index])
    return steps


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_ranks_and_workers_change_no_token(folder: Path, packing: str) -> None:
    run, data = opened(config(folder, packing=packing))
    expected = steps_of(run, data, ranks=1, workers=0)
    assert [len(step) for step in expected] == [GLOBAL_BATCH] * 6
    for ranks, workers in ((1, 1), (1, 4), (2, 0), (2, 1), (2, 4), (4, 0), (4, 1), (4, 4)):
        assert steps_of(run, data, ranks=ranks, workers=workers) == expected, (ranks, workers)


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_each_dataset_is_read_whole_once_per_its_epoch(folder: Path, packing: str) -> None:
    run, data = opened(config(folder, packing=packing))
    source = make_source(run, data, data.train)
    alone = text_sources(run, data, data.train)
    drawn = Counter(tuple(source.sample(index, 0).tokens.tolist()) for index in range(2000))
    epochs = source.epochs(2000)
    assert epochs["books"] > 2
    assert epochs["code"] > 2
    for name, count in epochs.items():
        each = round(1 / alone[name].epochs(1)[name])  # windows per epoch
        first = Counter(tuple(alone[name].sample(n, 0).tokens.tolist()) for n in range(each))
        assert count * each == round(count * each), "whole samples"
        assert not first - drawn, f"every window of the first epoch of {name} was drawn"


def test_a_single_text_is_drawn_in_the_order_of_its_windows_and_the_runs_seed(
    folder: Path,
) -> None:
    """As it always was: no mixture stands between."""
    run, data = opened(config(folder))
    (shards,) = {d.shards for d in data.train if d.name == "books"}
    source = make_source(run, data, data.train[:1])
    windows = WindowSampler(len(shards), window=65, stride=64, seed=run.seed)
    for index in range(100):
        expected = shards.window(windows.start(index), 65)
        assert np.array_equal(source.sample(index, 0).tokens, expected)


def test_each_share_is_that_of_its_weight(folder: Path) -> None:
    run, data = opened(config(folder))
    source = make_source(run, data, data.train)
    each = {d.name: 1 / text_sources(run, data, [d])[d.name].epochs(1)[d.name] for d in data.train}
    samples = 10_000
    shares = {name: count * each[name] / samples for name, count in source.epochs(samples).items()}
    assert shares == pytest.approx({"books": 0.9, "code": 0.1}, abs=0.01)


def test_tasks_are_planted_in_all_datasets_in_the_same_shares(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(Path(mc_ds.__file__).parent.rglob("*.py"))[:40]]
    tokenizer = train_tokenizer(texts, vocab_size=1000)  # its words serve as keys
    for name, some in (("books", texts), ("code", texts[10:])):
        write_dataset(tmp_path / name, tokenizer, some)
    recall = dict(facts_by_stage=[4], questions=1, value_tokens=2)
    run, data = opened(config(tmp_path, tasks={"corpus": 1, "recall": 1}, recall=recall))
    epochs = make_source(run, data, data.train).epochs(4 * BLOCK)
    assert epochs.keys() == {"books", "code", "recall/books", "recall/code"}
    assert epochs["books"] / epochs["code"] == pytest.approx(
        epochs["recall/books"] / epochs["recall/code"], rel=0.05
    )
    task = evaluated_task("recall", run, data, data.val, seed=0, wc_length=40, as_trained=True)
    assert isinstance(task, DomainsTask)
    assert {part.name for part in task.tasks} == {task.name} == {"recall"}
    assert all(task.sample(index).spans.size for index in range(20))


def test_documents_that_are_too_short_are_left_out(folder: Path) -> None:
    """Sequences of a document alone begin with its separator or lie behind it, never across."""
    run, data = opened(config(folder, packing="document", min_document_tokens=120))
    separator = data.tokenizer.separator_id
    for source in text_sources(run, data, data.train).values():
        for index in range(40):
            tokens = torch.from_numpy(source.sample(index, 0).tokens)
            assert (tokens[1:] != separator).all()


def test_what_is_left_out_and_what_is_read_often_is_said(folder: Path) -> None:
    run, data = opened(config(folder, packing="document", min_document_tokens=120))
    books, often = (
        line
        for line in reading_lines(run, data, {"books": 9.0, "code": 1.0})
        if "code:" not in line
    )
    lengths = np.diff([*data.train[0].shards.documents.tolist(), len(data.train[0].shards)])
    short = lengths[lengths < 120]
    assert 0 < len(short) < len(lengths)
    assert books == (
        f"data: books: without {len(short)} of {len(lengths)} documents, which are too short, with"
        f" {short.sum() / lengths.sum():.1%} of the tokens"
    )
    assert "steps read books 9 times;" in often
    stream, data = opened(config(folder))
    assert reading_lines(stream, data, {"books": 1.0}) == []
