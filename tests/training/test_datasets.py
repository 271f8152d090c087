"""Runs on datasets: ranks, workers and interruptions change nothing, each domain has its own loss,
and what cannot work is refused before anything is made.
"""

import pytest

from mc_ds.data import train_tokenizer
from tests.support.datasets import WORDS, write_dataset
from tests.support.tiny_run import Runs

LOSSES = ("train/loss", "data/epoch/books", "data/epoch/code")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("datasets"))
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    for name, texts in (("books", WORDS), ("code", WORDS[20:50]), ("held_out", WORDS[:30])):
        write_dataset(runs.folder / name, tokenizer, texts)
    named = [dict(path=str(runs.folder / name)) for name in ("books", "code", "held_out")]
    data = dict(
        datasets=[named[0] | dict(weight=0.7), named[1] | dict(weight=0.3)],
        validation=[named[0], named[2]],
        packing="document",
        verify="content",
    )
    short = dict(train=dict(total_steps=4), checkpoint=dict(interval=2), data=data)
    runs.work(
        1,
        [
            runs.scenario("one", **short),
            runs.scenario("cut", stop_after=3, **short),
            runs.scenario("resumed", name="cut", **short),
        ],
    )
    runs.work(2, [runs.scenario("two", **(short | dict(data=data | dict(num_workers=1))))])
    return runs


@pytest.mark.parametrize("other", ["cut", "two"])
def test_ranks_workers_and_interruptions_read_the_same(runs, other):
    expected, found = runs.records("one"), runs.records(other)
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    for mine, theirs in zip(expected[1:], found[1:], strict=True):
        for key in LOSSES:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key


def test_each_held_out_dataset_has_its_loss(runs):
    for record in (runs.records("one")[0], runs.records("one")[-1]):
        assert record["val/loss/books"] > 0
        assert record["val/loss/held_out"] > 0
        assert record["val/loss/books"] != record["val/loss/held_out"]
        assert "val/loss/code" not in record
