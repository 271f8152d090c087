"""A worker that is killed ends the preparation in one line."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import pytest

from mc_ds.data import train_tokenizer
from mc_ds.data.preparation import pool
from mc_ds.data.preparation.pool import encoded
from mc_ds.data.text.readers import Segment
from mc_ds.data.tokenizer import SentencePieceTokenizer
from tests.support.text_inputs import some_texts

KILLED = "a worker process was killed, perhaps for lack of memory: use fewer --workers"


class Deadly(SentencePieceTokenizer):
    """Kills the process that encodes with it."""

    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")


def blocks() -> Iterator[list[Segment]]:
    for number in range(1, 9):
        yield [Segment(0, "a.jsonl", "json", number, [b'{"text": "words"}'], False, number)]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    trained = train_tokenizer(some_texts(200), vocab_size=300)
    assert isinstance(trained, SentencePieceTokenizer)
    return trained


def test_a_killed_worker_is_told_in_one_line(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    deadly = Deadly(tokenizer.model)
    with pytest.raises(OSError, match=KILLED):
        list(encoded(blocks(), tmp_path, deadly, "text", workers=1))


def test_a_death_that_is_noticed_by_the_next_block_is_told_as_well(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ProcessPoolExecutor):
        def submit(self, *given: Any, **named: Any) -> Future[Any]:
            if given[1][0].first == 3:
                raise BrokenProcessPool("A child process terminated abruptly")
            return super().submit(*given, **named)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Broken)
    with pytest.raises(OSError, match=KILLED):
        list(encoded(blocks(), tmp_path, tokenizer, "text", workers=2))
    made = list(encoded(list(blocks())[:2], tmp_path, tokenizer, "text", workers=2))
    assert [path.exists() for path, _ in made] == [True, True]
