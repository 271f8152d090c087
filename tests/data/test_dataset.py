"""A dataset folder: what is written is what is opened, and damage is told in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mc_ds.config import ConfigError
from mc_ds.data import Tokenizer, train_tokenizer
from mc_ds.data.dataset import DatasetWriter, open_dataset
from mc_ds.data.manifest import SourceFacts

TEXTS = [f"value_{i} = compute(item, {i})\n" * (i + 1) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A dataset of twelve documents in shards of 100 tokens, every fourth for validation."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    with DatasetWriter(folder, tokenizer, shard_tokens=100) as writer:
        for i, text in enumerate(TEXTS):
            split = "validation" if i % 4 == 3 else "train"
            writer.append(split, tokenizer.encode_document(text))
        writer.finish(sources=[SourceFacts(name="texts", files=12, bytes=99)], licence="mine")
    return folder


def test_a_dataset_opens_with_every_document_of_its_split(
    folder: Path, tokenizer: Tokenizer
) -> None:
    dataset = open_dataset(folder, verify="content")
    assert dataset.tokenizer.sha256 == tokenizer.sha256 == dataset.manifest.tokenizer_sha256
    for split, shards in (("train", dataset.train), ("validation", dataset.validation)):
        wanted = [text for i, text in enumerate(TEXTS) if (i % 4 == 3) == (split == "validation")]
        ends = [*shards.documents[1:].tolist(), len(shards)]
        found = [
            shards.window(start, end - start)
            for start, end in zip(shards.documents.tolist(), ends, strict=True)
        ]
        assert [tokenizer.decode(tokens) for tokens in found] == wanted
        assert all(tokens[0] == tokenizer.separator_id for tokens in found)
        facts = dataset.manifest.splits[split]
        assert (facts.documents, facts.tokens) == (len(wanted), len(shards))
        lengths = [int(np.log2(tokens.size)) for tokens in found]
        assert facts.document_lengths == np.bincount(lengths).tolist()
    assert dataset.manifest.sources[0].name == "texts"
    assert dataset.manifest.licence == "mine"
    assert set(dataset.manifest.versions) == {"mc_ds", "sentencepiece"}


def test_documents_are_written_in_pieces_or_many_at_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with DatasetWriter(tmp_path, tokenizer, shard_tokens=4) as writer:
        writer.extend("train", np.array([1, 5, 6, 1, 7]), np.array([0, 3]))
        writer.extend("train", np.array([8, 9]), np.array([], dtype=np.int64))
        writer.append("train", np.array([1]))
        writer.finish()
    dataset = open_dataset(tmp_path)
    assert dataset.train.documents.tolist() == [0, 3, 7]
    assert dataset.train.window(0, 8).tolist() == [1, 5, 6, 1, 7, 8, 9, 1]
    assert dataset.manifest.splits["train"].document_lengths == [1, 1, 1]
    assert dataset.manifest.splits["validation"].document_lengths == []
    assert len(dataset.validation) == len(dataset.validation.documents) == 0


def test_lengths_are_counted_across_the_limit_of_documents_at_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mc_ds.data.dataset.LENGTHS_AT_ONCE", 2)
    with DatasetWriter(tmp_path, tokenizer) as writer:
        for length in (1, 2, 3, 4):
            writer.append("train", np.full(length, 1))
        writer.finish()
    assert open_dataset(tmp_path).manifest.splits["train"].document_lengths == [1, 2, 1]


def test_an_unfinished_dataset_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with DatasetWriter(tmp_path, tokenizer) as writer:
        writer.append("train", np.array([1]))
    with pytest.raises(
        ConfigError, match=r"is not a dataset: No such file .*tools/prepare_data.py"
    ):
        open_dataset(tmp_path)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_tokenizer(index: Path) -> None:
    """Replace the hash of the tokenizer in an index, which keeps its size."""
    content = json.loads(index.read_text())
    index.write_text(index.read_text().replace(content["tokenizer_sha256"], 64 * "0"))


def edit(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shorten(f / "train" / "tokens-00001.bin"), "tokens-00001.bin has 199 bytes"),
        (lambda f: shorten(f / "validation" / "documents.bin"), "documents.bin has 23 bytes"),
        (lambda f: (f / "train" / "index.json").unlink(), "index.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged manifest.json"),
        (edit("manifest.json", lambda m: m.update(format="v9")), "has the format 'v9'"),
        (edit("manifest.json", lambda m: m.pop("vocab_size")), "vocab_size: Field required"),
        (edit("manifest.json", lambda m: m.update(tokenizer_sha256="0")), "not made with its"),
        (lambda f: of_another_tokenizer(f / "validation" / "index.json"), "not made with its"),
    ],
)
def test_damage_is_found_by_size_and_told_in_one_line(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        open_dataset(folder)
    assert "\n" not in str(error.value)


def test_a_pipe_in_the_place_of_a_shard_is_no_dataset(folder: Path) -> None:
    path = folder / "train" / "tokens-00000.bin"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"tokens-00000.bin is not a regular file"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["train/tokens-00001.bin", "train/documents.bin"])
def test_a_flipped_bit_is_found_by_content(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[8] ^= 1
    (folder / name).write_bytes(content)
    open_dataset(folder, verify="size")
    with pytest.raises(ConfigError, match=r"^damaged dataset .*does not have the SHA-256"):
        open_dataset(folder, verify="content")
