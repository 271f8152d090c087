"""Preparing a corpus: cached, keyed by all that matters, safe against concurrent and killed
processes.
"""

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_ds.config import ConfigError, DataConfig
from mc_ds.data import LanguageModelSource, PreparedCorpus, StdlibCorpus, prepare_corpus
from mc_ds.data import prepare as prepare_module
from tests.support.tiny_run import TIMEOUT_S

VOCAB = 330


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty files of made-up code."""
    folder, rng = tmp_path / "source", random.Random(0)
    folder.mkdir()
    for i in range(40):
        lines = [
            f"    value_{rng.randrange(30)} = compute(item, {rng.randrange(100)})"
            for _ in range(30)
        ]
        (folder / f"module_{i}.py").write_text(
            f"def function_{i}(item):\n" + "\n".join(lines) + "\n"
        )
    return folder


def config(tmp_path: Path, vocab_size: int = VOCAB, tokenizer: str | None = None) -> DataConfig:
    return DataConfig(
        cache_dir=str(tmp_path / "cache"),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        val_fraction=0.2,
    )


def prepare(tmp_path: Path, root: Path, **changes: Any) -> tuple[PreparedCorpus, list[str]]:
    lines: list[str] = []
    return prepare_corpus(
        config(tmp_path, **changes), StdlibCorpus(0.2, root=root), report=lines.append
    ), lines


def test_shards_decode_to_the_documents_of_their_split(tmp_path: Path, root: Path) -> None:
    prepared, _ = prepare(tmp_path, root)
    corpus = StdlibCorpus(0.2, root=root)
    for split, shards in (("train", prepared.train), ("val", prepared.val)):
        ids = shards.window(0, len(shards))
        documents = [
            prepared.tokenizer.decode(part)
            for part in np.split(ids, np.flatnonzero(ids == prepared.tokenizer.separator_id))[1:]
        ]
        assert documents == list(corpus.documents(split))
        assert len(documents) > 0
        assert shards.index.vocab_size == prepared.tokenizer.vocab_size == VOCAB


def test_the_tokenizer_never_sees_the_validation_split(tmp_path: Path, root: Path) -> None:
    corpus = StdlibCorpus(0.2, root=root)
    before, _ = prepare(tmp_path, root)
    (root / corpus.split_files("val")[0]).write_text("zzzzzzzzqqqqqqqq = 1\n" * 200)
    after, _ = prepare(tmp_path, root)
    assert after.folder != before.folder
    assert after.tokenizer.sha256 == before.tokenizer.sha256


def test_a_second_call_reuses_the_cache_and_any_change_does_not(tmp_path: Path, root: Path) -> None:
    first, lines = prepare(tmp_path, root)
    assert len(lines) == 3
    again, lines = prepare(tmp_path, root)
    assert lines == []
    assert again.folder == first.folder
    assert prepare(tmp_path, root, vocab_size=VOCAB + 1)[0].folder != first.folder
    (root / "module_0.py").write_text("changed = True\n")
    assert prepare(tmp_path, root)[0].folder != first.folder


def test_a_given_tokenizer_is_used_as_it_is_and_is_part_of_the_key(
    tmp_path: Path, root: Path
) -> None:
    trained, _ = prepare(tmp_path, root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trained.tokenizer.save(elsewhere)
    given, lines = prepare(tmp_path, root, tokenizer=str(elsewhere), vocab_size=4096)
    assert given.folder != trained.folder
    assert lines[0].startswith(f"data: encoding stdlib with the tokenizer of {elsewhere} ")
    assert given.tokenizer.sha256 == trained.tokenizer.sha256
    assert given.train.index.vocab_size == VOCAB
    assert np.array_equal(
        given.val.window(0, len(given.val)), trained.val.window(0, len(trained.val))
    )
    moved = elsewhere.rename(tmp_path / "moved")
    assert (
        prepare(tmp_path, root, tokenizer=str(moved))[0].folder == given.folder
    )  # what it is decides, not where, nor data.vocab_size
    prepare(tmp_path, root, vocab_size=VOCAB + 1)[0].tokenizer.save(moved)
    assert prepare(tmp_path, root, tokenizer=str(moved))[0].folder != given.folder
    with pytest.raises(ConfigError, match="elsewhere does not exist"):
        prepare(tmp_path, root, tokenizer=str(elsewhere))


def _concurrently(
    start: "multiprocessing.synchronize.Barrier",
    results: "multiprocessing.Queue[tuple[str, int]]",
    data: DataConfig,
    root: Path,
) -> None:
    lines: list[str] = []
    start.wait()
    prepared = prepare_corpus(data, StdlibCorpus(0.2, root=root), report=lines.append)
    results.put((str(prepared.folder), len(lines)))


def test_processes_that_ask_at_once_get_one_folder_made_by_one_of_them(
    tmp_path: Path, root: Path
) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_concurrently, args=(start, results, config(tmp_path), root))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=TIMEOUT_S) for _ in processes]
    for process in processes:
        process.join(timeout=TIMEOUT_S)
        assert process.exitcode == 0
    assert len({folder for folder, _ in answers}) == 1
    assert sorted(lines for _, lines in answers) == [0, 0, 3]


def test_a_failed_preparation_leaves_nothing_behind(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write_split", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare(tmp_path, root)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, root: Path) -> None:
    folder = prepare(tmp_path, root)[0].folder
    killed = folder.rename(folder.with_name(f"{folder.name}.partial-0123456789abcdef"))
    assert prepare(tmp_path, root)[0].folder == folder
    assert folder.exists()
    assert not killed.exists()


def test_a_damaged_cache_is_told_in_one_line(tmp_path: Path, root: Path) -> None:
    folder = prepare(tmp_path, root)[0].folder
    shard = folder / "train" / "tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^damaged token shard .*delete the folder and prepare the data again$"
    ):
        prepare(tmp_path, root)


def test_an_empty_split_and_an_impossible_vocabulary_are_refused(
    tmp_path: Path, root: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"^data.vocab_size = 60000: a tokenizer cannot be trained"
    ):
        prepare(tmp_path, root, vocab_size=60000)
    for name in StdlibCorpus(0.2, root=root).split_files("val"):
        (root / name).unlink()
    with pytest.raises(
        ConfigError,
        match=r"^no document of stdlib falls into the val split: change data.val_fraction",
    ):
        prepare(tmp_path, root)


def test_a_source_reads_prepared_shards_and_refuses_sequences_longer_than_the_corpus(
    tmp_path: Path, root: Path
) -> None:
    prepared, _ = prepare(tmp_path, root)
    source = LanguageModelSource(prepared.val, seq_len=64, horizon_tokens=8, seed=0)
    sample = source.sample(0, stage=0)
    assert sample.tokens.shape == (65,)
    assert sample.horizon_mask.tolist() == [1.0] * 8
    whole = prepared.val.window(0, len(prepared.val)).tolist()
    assert any(whole[i : i + 65] == sample.tokens.tolist() for i in range(len(whole)))
    with pytest.raises(
        ValueError, match=rf"the corpus has {len(whole)} tokens, a sample needs 10000001"
    ):
        LanguageModelSource(prepared.val, seq_len=10_000_000, horizon_tokens=8, seed=0)
