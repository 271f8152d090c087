"""The data of a run: several datasets as domains, what does not go together in one line, and
opening that reads nothing of the tokens.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mc_ds.config import ConfigError, DataConfig
from mc_ds.config.cli import load_config
from mc_ds.data import LanguageModelSource, Tokenizer, open_data, train_tokenizer
from mc_ds.data.run_data import verify_content
from mc_ds.data.source import windows_of
from tests.support.datasets import WORDS, write_dataset
from tests.support.processes import ROOT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, vocab_size=300)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Datasets `books` and `code` of one tokenizer."""
    write_dataset(tmp_path / "books", tokenizer)
    write_dataset(tmp_path / "code", tokenizer, WORDS[:20])
    return tmp_path


def config(folder: Path, *names: str, **changes: Any) -> DataConfig:
    datasets = [dict(path=str(folder / name)) for name in names]
    return DataConfig.model_validate({"datasets": datasets, **changes})


def test_datasets_are_domains_of_both_splits(folder: Path, tokenizer: Tokenizer) -> None:
    entries = [
        dict(path=str(folder / "books"), weight=3),
        dict(path=str(folder / "code"), name="python"),
    ]
    data = open_data(DataConfig(datasets=entries))
    assert (data.tokenizer.sha256, data.title) == (tokenizer.sha256, "books, python")
    assert [(d.name, d.weight) for d in data.train] == [("books", 3), ("python", 1)]
    assert [d.shards.folder for d in data.train] == [folder / "books/train", folder / "code/train"]
    assert [d.shards.folder.name for d in data.val] == ["validation", "validation"]


def test_validation_may_be_of_other_datasets(folder: Path) -> None:
    data = open_data(config(folder, "books", validation=[dict(path=str(folder / "code"))]))
    assert [d.name for d in data.train] == ["books"]
    assert [d.shards.folder for d in data.val] == [folder / "code/validation"]


def test_identity_is_that_of_content_and_weights_wherever_the_folders_lie(folder: Path) -> None:
    def identity(*names: str, weights: tuple[float, ...]) -> str:
        pairs = zip(names, weights, strict=True)
        entries = [dict(path=str(folder / name), weight=weight) for name, weight in pairs]
        return open_data(DataConfig(datasets=entries)).identity

    before = identity("books", "code", weights=(1, 2))
    assert before != identity("books", "code", weights=(2, 1))
    assert before != identity("code", "books", weights=(2, 1)), "the order decides too"
    shutil.move(folder / "books", folder / "moved")
    assert before == identity("moved", "code", weights=(1, 2))


def test_datasets_of_two_tokenizers_are_refused(folder: Path) -> None:
    other = train_tokenizer(WORDS, vocab_size=310)
    write_dataset(folder / "odd", other)
    with pytest.raises(
        ConfigError,
        match=r"odd was made with another tokenizer \(vocabulary 310\) than .*books \(vocabulary 300\):",
    ):
        open_data(config(folder, "books", "odd"))
    (folder / "given").mkdir()
    other.save(folder / "given")
    with pytest.raises(ConfigError, match=r"books was made with another tokenizer .* than .*given"):
        open_data(config(folder, "books", tokenizer=str(folder / "given")))
    with pytest.raises(ConfigError, match="than the model"):
        open_data(config(folder, "books"), tokenizer=other)


def test_a_dataset_named_twice_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "books", folder / "copy")
    with pytest.raises(ConfigError, match=r"books and .*copy are the same dataset: list it once"):
        open_data(config(folder, "books", "copy"))
    with pytest.raises(
        ValueError, match="several datasets have the name 'books': set a different `name`"
    ):
        config(folder, "books", "books")


def test_a_missing_dataset_is_one_line(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere is not a dataset: .*: give a folder made by tools/"
    ):
        open_data(config(folder, "nowhere"))


def test_a_flipped_byte_is_found_where_content_is_verified(folder: Path) -> None:
    verify_content(config(folder, "books", "code"))
    shard = folder / "code" / "validation" / "tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    open_data(config(folder, "books", "code"))
    with pytest.raises(
        ConfigError, match=r"damaged dataset .*code: tokens-00000.bin does not have"
    ):
        verify_content(config(folder, "books", "code"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(validation=[dict(path="x")]), "validation is set but data.datasets is empty"),
        (
            dict(min_document_tokens=5),
            "min_document_tokens = 5 has no effect with data.packing = stream",
        ),
        (dict(datasets=[dict(path="x", weight=0)]), "greater than 0"),
        (dict(datasets=[dict(path="x", weight=float("nan"))]), "finite number|greater than 0"),
        (dict(datasets=[dict(path="x", weight=-1)]), "greater than 0"),
        (dict(datasets=[dict(path="x", name="a b")]), "should match pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate(changes)


@pytest.mark.parametrize(
    ("patterns", "inputs"),
    [
        ({}, "'{root}'"),
        ({"patterns": ["*.txt", "notes/*.md"]}, "'{root}/**/*.txt' '{root}/notes/*.md'"),
    ],
)
def test_a_large_folder_is_refused_with_the_command_that_prepares_it(
    tmp_path: Path, patterns: dict[str, Any], inputs: str
) -> None:
    root = tmp_path / "my text"
    root.mkdir()
    with (root / "big.txt").open("wb") as file:
        file.truncate(3_000_000)
    given = dict(source="files", root=str(root), inline_limit_mb=2, vocab_size=500, **patterns)
    with pytest.raises(ConfigError) as error:
        open_data(DataConfig.model_validate(given))
    assert str(error.value) == (
        f"data.root = {root} has 3 MB of text, above data.inline_limit_mb = 2: run `python"
        f" tools/prepare_data.py {inputs.format(root=root)} --out DATASET --train_tokenizer"
        " --vocab_size 500 --val_fraction 0.05` once,"
        """ then train with --data.datasets '[{"path": "DATASET"}]'"""
    )


def grow(dataset: Path, shards: int, tokens: int) -> int:
    """Make the train split one of sparse files, which take no room; return its bytes."""
    split, bytes_each = dataset / "train", 2 * tokens
    index = json.loads((split / "index.json").read_text())
    manifest = json.loads((dataset / "manifest.json").read_text())
    index["shards"] = [
        dict(index["shards"][0], file=f"tokens-{n:05d}.bin", tokens=tokens) for n in range(shards)
    ]
    index["token_count"] = shards * tokens
    index["document_count"] = shards * tokens // 500
    sizes = {shard["file"]: bytes_each for shard in index["shards"]}
    sizes["documents.bin"] = 8 * index["document_count"]
    for name, size in sizes.items():
        with (split / name).open("wb") as file:
            file.truncate(size)
        manifest["files"][f"train/{name}"] = dict(bytes=size, sha256="0" * 64)
    text = json.dumps(index)
    (split / "index.json").write_text(text)
    facts = dict(bytes=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())
    manifest["files"]["train/index.json"] = facts
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    return shards * bytes_each


def bytes_read(dataset: Path) -> int:
    """Bytes that this process has read, or holds of mapped files of `dataset`."""
    called = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    mapped = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(dataset) in line
        elif ours and line.startswith("Rss:"):
            mapped += 1024 * int(line.split()[1])
    return called + mapped


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="counts what Linux counts")
def test_a_start_reads_little_of_a_large_dataset(folder: Path) -> None:
    books = folder / "books"
    assert grow(books, shards=373, tokens=1 << 26) > 50e9
    settings = config(folder, "books")
    bytes_read(books)
    overhead = -bytes_read(books) + bytes_read(books)  # of looking itself
    before = bytes_read(books)
    data = open_data(settings)
    (domain,) = data.train
    source = LanguageModelSource(
        domain.shards,
        seq_len=1024,
        horizon_tokens=8,
        seed=0,
        windows=windows_of(domain.shards, settings, seq_len=1024, seed=0, cache=data.cache),
    )
    for index in range(16):
        assert source.sample(index, 0).tokens.shape == (1025,)
    assert bytes_read(books) - before - overhead < 10e6


def test_the_command_of_the_refusal_makes_what_the_run_then_opens(tmp_path: Path) -> None:
    root = tmp_path / "text"
    root.mkdir()
    for number, text in enumerate(WORDS):
        (root / f"{number}.txt").write_text(text)
    given = dict(source="files", root=str(root), inline_limit_mb=1e-3, vocab_size=300)
    with pytest.raises(ConfigError) as error:
        open_data(DataConfig.model_validate(given | dict(val_fraction=0.2)))
    command, options = re.fullmatch(
        r".*run `python (.*)` once, then train with (.*)", str(error.value)
    ).groups()
    words = [str(tmp_path / "made") if w == "DATASET" else w for w in shlex.split(command)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = load_config(shlex.split(options.replace("DATASET", str(tmp_path / "made"))))
    data = open_data(config.data)
    assert data.tokenizer.vocab_size == 300
    assert [domain.name for domain in data.val] == ["made"]
