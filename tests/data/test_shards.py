"""Token shards read back as the one row of tokens that was appended, whatever the shard size."""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mc_ds.data.shards import INDEX_NAME, ShardWriter, TokenShards

VOCAB = 1000


def write(
    folder: Path,
    documents: list[NDArray[np.int64]],
    *,
    shard_tokens: int = 7,
    vocab_size: int = VOCAB,
) -> TokenShards:
    with ShardWriter(
        folder, vocab_size=vocab_size, tokenizer_sha256="abc", shard_tokens=shard_tokens
    ) as writer:
        for document in documents:
            writer.append(document)
    return TokenShards(folder)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 30),
)
def test_windows_equal_the_concatenated_documents(
    data: st.DataObject, lengths: list[int], shard_tokens: int
) -> None:
    rng = np.random.default_rng(len(lengths))
    documents = [rng.integers(VOCAB, size=length) for length in lengths]
    whole = np.concatenate(documents)
    with tempfile.TemporaryDirectory() as folder:
        shards = write(Path(folder), documents, shard_tokens=shard_tokens)
        assert len(shards) == len(whole)
        assert shards.documents.tolist() == np.cumsum([0, *lengths])[:-1].tolist()
        assert len(shards.index.shards) == -(-len(whole) // shard_tokens)
        for _ in range(5):
            start = data.draw(st.integers(0, len(whole)))
            length = data.draw(st.integers(0, len(whole) - start))
            window = shards.window(start, length)
            assert window.dtype == np.int64
            np.testing.assert_array_equal(window, whole[start : start + length])


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "bytes_per_token"), [(65536, "uint16", 2), (65537, "uint32", 4)]
)
def test_the_vocabulary_decides_the_width_and_the_largest_id_survives(
    tmp_path: Path, vocab_size: int, dtype: str, bytes_per_token: int
) -> None:
    shards = write(tmp_path, [np.array([0, vocab_size - 1])], vocab_size=vocab_size)
    assert shards.index.dtype == dtype
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 2 * bytes_per_token
    assert shards.window(0, 2).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_refused_and_leave_the_folder_unfinished(
    tmp_path: Path, bad: int
) -> None:
    with pytest.raises(ValueError, match=rf"token ids .* exceed the vocabulary of {VOCAB}"):
        write(tmp_path, [np.array([1, bad])])
    with pytest.raises(ValueError, match=r"index.json: it cannot be read"):
        TokenShards(tmp_path)


def test_finished_shards_are_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path, [np.arange(10)])
    with pytest.raises(ValueError, match="already has complete token shards"):
        write(tmp_path, [np.arange(10)])


def test_windows_outside_of_the_corpus_are_refused(tmp_path: Path) -> None:
    shards = write(tmp_path, [np.arange(20)])
    for start, length in ((-1, 3), (18, 3), (21, 0)):
        with pytest.raises(ValueError, match="is outside of the 20 tokens"):
            shards.window(start, length)


def test_pickling_carries_the_folder_and_not_the_tokens(tmp_path: Path) -> None:
    shards = write(tmp_path, [np.arange(900)], shard_tokens=1000)
    content = pickle.dumps(shards)
    assert len(content) < 500
    assert pickle.loads(content).documents.tolist() == [0]
    assert pickle.loads(content).window(3, 5).tolist() == [3, 4, 5, 6, 7]


def truncate(folder: Path) -> None:
    path = folder / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-3])


def remove(folder: Path) -> None:
    (folder / "tokens-00001.bin").unlink()


def break_index(folder: Path) -> None:
    path = folder / INDEX_NAME
    path.write_text(path.read_text()[:40])


def change_count(folder: Path) -> None:
    path = folder / INDEX_NAME
    path.write_text(path.read_text().replace('"token_count": 20', '"token_count": 21'))


@pytest.mark.parametrize("damage", [truncate, remove, break_index, change_count])
def test_damage_is_found_on_opening_and_told_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write(tmp_path, [np.arange(20)])
    damage(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^damaged token shard .+: .+; delete the folder and prepare the data again$",
    ):
        TokenShards(tmp_path)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin"])
def test_a_flipped_bit_is_found_by_verifying(tmp_path: Path, name: str) -> None:
    shards = write(tmp_path, [np.arange(20)]).verify()
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"^damaged token shard .*{name}: its content differs from the hash",
    ):
        shards.verify()
