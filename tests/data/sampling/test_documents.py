"""Windows within documents: every one once per epoch, none across a boundary, what is too short
counted.
"""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import ConfigError
from mc_ds.data import ShardWriter, TokenShards
from mc_ds.data.sampling import documents
from mc_ds.data.sampling.documents import DocumentSampler, index_documents

T = 8


def write(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents of these lengths; each token is the number of its document."""
    with ShardWriter(folder, vocab_size=1000, tokenizer_sha256="", shard_tokens=64) as writer:
        for number, length in enumerate(lengths):
            writer.append(np.full(length, number))
    return TokenShards(folder)


def drawn(sampler: DocumentSampler, epoch: int) -> list[int]:
    """Starts of an epoch, sorted."""
    per_epoch = sampler.windows_per_epoch
    return sorted(sampler.start(epoch * per_epoch + index) for index in range(per_epoch))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    shortest=st.integers(0, 30),
    at_once=st.integers(1, 8),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 5),
)
def test_an_epoch_draws_each_window_of_each_long_document_once(
    lengths: list[int], shortest: int, at_once: int, seed: int, epoch: int
) -> None:
    wanted = {n: length for n, length in enumerate(lengths) if length >= max(T + 1, shortest)}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "AT_ONCE", at_once)
        shards = write(Path(folder) / "shards", lengths)
        cache = Path(folder) / "cache"
        if not wanted:
            with pytest.raises(ConfigError, match=f"none of the {len(lengths)} documents"):
                index_documents(shards, seq_len=T, min_document_tokens=shortest, cache=cache)
            return
        index = index_documents(shards, seq_len=T, min_document_tokens=shortest, cache=cache)
        starts = drawn(DocumentSampler(index, seq_len=T, seed=seed), epoch)
        found: dict[int, list[int]] = {}
        for start in starts:
            (number,) = set(shards.window(start, T + 1).tolist())  # one document alone
            found.setdefault(number, []).append(start)
    assert {n: len(places) for n, places in found.items()} == {
        n: (length - 1) // T for n, length in wanted.items()
    }
    for places in found.values():
        assert set(np.diff(places)) <= {T}, "side by side: each token is a label once"
    assert (index.documents, index.dropped) == (len(wanted), len(lengths) - len(wanted))
    assert index.dropped_tokens == sum(lengths) - sum(wanted.values())


def test_windows_begin_at_every_offset_that_there_is_another_one_in_each_epoch(
    tmp_path: Path,
) -> None:
    """A document of 30 tokens has three windows of nine, and six places where they may begin."""
    index = index_documents(
        write(tmp_path / "shards", [5, 30]),
        seq_len=T,
        min_document_tokens=0,
        cache=tmp_path / "cache",
    )
    sampler = DocumentSampler(index, seq_len=T, seed=1)
    firsts = [drawn(sampler, epoch)[0] for epoch in range(200)]
    assert set(firsts) == set(range(5, 5 + 30 - (3 * T + 1) + 1))


def test_the_order_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", [20, 9, 40, 70] * 5)
    index = index_documents(shards, seq_len=T, min_document_tokens=0, cache=tmp_path / "cache")
    again = index_documents(shards, seq_len=T, min_document_tokens=0, cache=tmp_path / "cache")
    assert again.folder == index.folder, "made once"
    sampler = DocumentSampler(index, seq_len=T, seed=1)
    copy = pickle.loads(pickle.dumps(DocumentSampler(again, seq_len=T, seed=1)))
    assert len(pickle.dumps(copy)) < 1000, "it travels by its name"
    starts = [sampler.start(index) for index in range(300)]
    assert [copy.start(index) for index in reversed(range(300))] == starts[::-1]
    other = DocumentSampler(index, seq_len=T, seed=2)
    assert [other.start(index) for index in range(300)] != starts


def test_nothing_long_enough_is_one_line_with_the_setting(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", [8, 30])
    with pytest.raises(
        ConfigError, match=r"none of the 2 documents .* data\.min_document_tokens = 31 tokens: use"
    ):
        index_documents(shards, seq_len=T, min_document_tokens=31, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"mc\.seq_len \+ 1 = 65 tokens"):
        index_documents(shards, seq_len=64, min_document_tokens=0, cache=tmp_path / "cache")
