"""From inputs to a dataset: what is kept, where it goes, and that nothing else decides."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mc_ds.config import ConfigError
from mc_ds.data import open_dataset, train_tokenizer
from mc_ds.data.preparation import PrepareOptions, describe, prepare, prepare_dataset
from mc_ds.data.preparation.parts import Part
from mc_ds.data.text.cutting import PIECE_BYTES
from mc_ds.storage import StagedFolder
from tests.support.processes import ROOT
from tests.support.read_only import read_only
from tests.support.text_inputs import (
    all_documents,
    content_of,
    documents_of,
    gz,
    json_lines,
    parquet,
    some_texts,
    zst,
)

TEXTS = some_texts(300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder / train_tokenizer(TEXTS, vocab_size=300).save(folder)


@pytest.fixture
def options(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareOptions:
    """Three files of a hundred texts each, in blocks of few lines."""
    monkeypatch.setattr("mc_ds.data.text.readers.LINES_BYTES", 4000)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 6000)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gz(json_lines(TEXTS[:100])))
    (folder / "b.parquet").write_bytes(parquet(TEXTS[100:200]))
    (folder / "c.jsonl.zst").write_bytes(zst(json_lines(TEXTS[200:])))
    return PrepareOptions(
        inputs=[str(folder)], out=tmp_path / "dataset", tokenizer=tokenizer, val_fraction=0.2
    )


def run(options: PrepareOptions, **changes: Any) -> list[str]:
    lines: list[str] = []
    prepare_dataset(replace(options, **changes), report=lines.append)
    return lines


def test_every_document_is_in_one_split_in_order(options: PrepareOptions) -> None:
    lines = run(options, licence="CC0", workers=2)
    dataset = open_dataset(options.out, verify="content")
    train, validation = documents_of(dataset, "train"), documents_of(dataset, "validation")
    assert sorted([*train, *validation]) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 30 < len(validation) < 90
    assert dataset.manifest.licence == "CC0"
    assert dataset.manifest.sources[0].files == 3
    assert lines[-1].startswith("data: 3 files, 300 documents, ")
    assert list(options.out.parent.glob("dataset.*")) == []


def test_the_folder_is_the_same_for_any_workers_and_after_any_other_order_of_work(
    options: PrepareOptions, tmp_path: Path
) -> None:
    run(options, workers=1)
    run(options, workers=3, out=tmp_path / "other")
    assert content_of(options.out) == content_of(tmp_path / "other")
    assert len(content_of(options.out)) == 8


def test_the_split_of_a_document_is_decided_by_its_text_alone(
    options: PrepareOptions, tmp_path: Path
) -> None:
    run(options)
    before = set(documents_of(open_dataset(options.out), "validation"))
    (tmp_path / "text" / "0.jsonl").write_bytes(json_lines(some_texts(50, first=1000)))
    run(options, out=tmp_path / "more")
    after = set(documents_of(open_dataset(tmp_path / "more"), "validation"))
    assert before < after


def test_equal_texts_are_kept_once_also_across_forms_and_pieces(
    options: PrepareOptions, tmp_path: Path
) -> None:
    long = "".join(f"line {i}\n" for i in range(80_000))
    assert len(long) > 2 * PIECE_BYTES
    (tmp_path / "text" / "d.txt").write_text(long)
    (tmp_path / "text" / "e.jsonl").write_bytes(
        json_lines([TEXTS[5], long, long + "another end", TEXTS[5], "  "])
    )
    run(options)
    dataset = open_dataset(options.out)
    assert sorted(all_documents(dataset)) == sorted([*TEXTS, long, long + "another end"])
    assert dataset.manifest.skipped == {"duplicates": 3, "empty": 1}


def test_documents_outside_the_limits_of_length_are_left_out(options: PrepareOptions) -> None:
    run(options)
    lengths = {
        text: open_dataset(options.out).tokenizer.encode_document(text).size for text in TEXTS
    }
    run(options, min_document_tokens=60, max_document_tokens=150, overwrite=True)
    dataset = open_dataset(options.out)
    wanted = sorted(text for text, length in lengths.items() if 60 <= length <= 150)
    assert sorted(all_documents(dataset)) == wanted
    assert 0 < len(wanted) < len(TEXTS)
    skipped = dataset.manifest.skipped
    assert skipped["too short"] + skipped["too long"] == len(TEXTS) - len(wanted)


def test_a_single_document_is_split_by_position(options: PrepareOptions, tmp_path: Path) -> None:
    text = "".join(f"{i} is a number\n" for i in range(60_000))
    (tmp_path / "one.txt").write_text(text)
    run(options, inputs=[str(tmp_path / "one.txt")], val_fraction=0.25)
    dataset = open_dataset(options.out)
    (begin,), (end,) = documents_of(dataset, "train"), documents_of(dataset, "validation")
    assert begin + end == text
    assert len(dataset.validation) - 1 == pytest.approx(0.25 * len(dataset.train) / 0.75, rel=0.01)
    assert dataset.validation.window(0, 1)[0] == dataset.tokenizer.separator_id


def test_an_empty_split_is_refused_with_a_share_that_works(options: PrepareOptions) -> None:
    folder = Path(options.inputs[0])
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS[:6]))
    with pytest.raises(ConfigError, match=r"none of 6 documents falls into the validation") as e:
        run(options, val_fraction=1e-6)
    share = float(str(e.value).split("use --val_fraction ")[1].split(",")[0])
    run(options, val_fraction=share)
    assert len(documents_of(open_dataset(options.out), "validation")) == 1


def test_faults_fail_with_file_and_line_or_are_counted(options: PrepareOptions) -> None:
    folder = Path(options.inputs[0])
    (folder / "a2.jsonl").write_bytes(
        b'{"text": "good line"}\n{"text": 7}\n{"text": 8}\n{"text": "also good"}\n{bad\n'
    )
    (folder / "a3.jsonl.gz").write_bytes(gz(json_lines(some_texts(900, first=500)))[:-20])
    (folder / "a4.txt").write_bytes(("line\n" * 90_000).encode() + b"\xff")
    (folder / "a5.txt").write_bytes(b"\0\1\2")
    (folder / "a6.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a2.jsonl:2: field 'text' is a number") as error:
        run(options)
    assert "\n" not in str(error.value)
    assert not options.out.exists()
    lines = run(options, on_error="skip", workers=2)
    dataset = open_dataset(options.out)
    assert sorted(all_documents(dataset)) == sorted([*TEXTS, "good line", "also good"])
    assert dataset.manifest.skipped == {
        "binary": 1,
        "broken JSON": 1,
        "empty": 1,
        "text not a string": 2,
        "undecodable bytes": 1,
        "unreadable file": 1,
    }
    named = [line.split(": ", 1)[1].rpartition("/")[2] for line in lines if ": skipped, " in line]
    assert any("a4.txt:90001: byte 0xff is not UTF-8" in line for line in named)
    assert sum("a2.jsonl" in line for line in named) == 3


def test_empty_files_are_counted_whatever_faults_do(options: PrepareOptions) -> None:
    folder = Path(options.inputs[0])
    names = ["d.txt", "d.txt.gz", "d.md.zst", "d.jsonl", "d.jsonl.gz", "d.ndjson.zst"]
    for name in names:
        (folder / name).write_bytes(b"")
    (folder / "e.jsonl.gz").write_bytes(gz(b""))
    (folder / "f.jsonl").write_bytes(b"\xef\xbb\xbf")
    run(options)
    dataset = open_dataset(options.out)
    assert dataset.manifest.skipped == {"empty": len(names) + 2}
    assert sorted(all_documents(dataset)) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.parquet"])
def test_a_fault_of_a_file_fails_in_one_line(options: PrepareOptions, name: str) -> None:
    path = Path(options.inputs[0]) / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=rf"{name} ") as error:
        run(options)
    assert "\n" not in str(error.value)


def test_records_above_the_limit_are_counted_whatever_faults_do(
    options: PrepareOptions, tmp_path: Path
) -> None:
    (tmp_path / "text" / "big.jsonl").write_bytes(json_lines(["x" * 1_000_001, "fits"]))
    lines = run(options, max_document_mb=1)
    assert open_dataset(options.out).manifest.skipped == {"too large": 1}
    assert any("big.jsonl:1: larger than --max_document_mb 1" in line for line in lines)


def test_nothing_left_is_refused(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="no document is left"):
        run(options, inputs=[str(tmp_path / "empty.txt")])


def test_a_tokenizer_is_trained_on_the_training_split_alone(
    options: PrepareOptions, tmp_path: Path
) -> None:
    run(options, tokenizer=None, vocab_size=305)
    first = open_dataset(options.out)
    held_out = set(documents_of(first, "validation"))
    kept = [text for text in TEXTS if text not in held_out]
    assert first.tokenizer.sha256 == train_tokenizer(kept, vocab_size=305).sha256
    with pytest.raises(ConfigError, match=r"^--vocab_size = 60000: a tokenizer cannot be trained"):
        run(options, tokenizer=None, vocab_size=60000, out=tmp_path / "other")


def test_a_tokenizer_of_one_text_does_not_see_its_end(
    options: PrepareOptions, tmp_path: Path
) -> None:
    path = tmp_path / "one.txt"
    text = "".join(f"{i} is a number\n" for i in range(40_000))
    hashes = []
    for end in ("", "zqzqzqzq" * 9000):
        path.write_text(text + (end or "abcdefgh" * 9000))
        run(
            options,
            inputs=[str(path)],
            tokenizer=None,
            vocab_size=300,
            val_fraction=0.2,
            overwrite=True,
        )
        hashes.append(open_dataset(options.out).tokenizer.sha256)
    assert hashes[0] == hashes[1]


def test_an_existing_folder_stays_unless_it_is_a_dataset_to_overwrite(
    options: PrepareOptions,
) -> None:
    run(options)
    with pytest.raises(ConfigError, match="exists: give another path, or --overwrite"):
        run(options)
    run(options, overwrite=True)
    (options.out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="is not a dataset"):
        run(options, overwrite=True)
    assert (options.out / "train").exists()


def test_parts_of_a_preparation_that_was_killed_at_its_end_go(options: PrepareOptions) -> None:
    run(options)
    parts = options.out.with_name("dataset.parts")
    parts.mkdir()
    (parts / "a.safetensors").write_bytes(b"old")
    with StagedFolder(options.out), pytest.raises(ConfigError, match="exists: give another path"):
        run(options)
    assert list(parts.iterdir()), "those of another preparation stay"
    with pytest.raises(ConfigError, match="exists: give another path"):
        run(options)
    assert not parts.exists()
    assert open_dataset(options.out, verify="content")


def test_a_preparation_that_begins_when_another_one_ends_keeps_its_parts(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = options.out.with_name("dataset.parts")
    publish = StagedFolder.publish
    others: list[StagedFolder] = []

    def publish_and_lose_the_lock(staged: StagedFolder, **given: Any) -> Path:
        target = publish(staged, **given)
        others.append(StagedFolder(target))
        return target

    monkeypatch.setattr(StagedFolder, "publish", publish_and_lose_the_lock)
    run(options)
    assert list(parts.iterdir())
    others[0].discard()


def test_a_second_preparation_into_one_folder_is_refused(options: PrepareOptions) -> None:
    with StagedFolder(options.out), pytest.raises(ConfigError, match=r"in use by process"):
        run(options)
    run(options)


def test_a_read_only_dataset_opens(options: PrepareOptions) -> None:
    run(options)
    with read_only(options.out.parent):
        assert sorted(all_documents(open_dataset(options.out, verify="content"))) == sorted(TEXTS)


def test_a_dataset_is_described(options: PrepareOptions) -> None:
    run(options)
    lines = list(describe(options.out, documents=1))
    assert any(line.startswith("source ") and ": 3 files, " in line for line in lines)
    assert any(line.startswith("train: ") and "documents" in line for line in lines)
    train = documents_of(open_dataset(options.out), "train")
    assert train[0][:100] in "\n".join(lines)


def test_what_was_encoded_is_not_encoded_again(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(options.inputs[0]) / "z.jsonl").write_bytes(b"{bad")
    with pytest.raises(ConfigError, match=r"z.jsonl:1: broken JSON"):
        run(options)
    parts = options.out.with_name("dataset.parts")
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert len(before) > 5
    seen = {}
    write_table = prepare.write_table

    def look(*args: Any) -> int:
        seen.update({path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")})
        return write_table(*args)

    monkeypatch.setattr(prepare, "write_table", look)
    (Path(options.inputs[0]) / "z.jsonl").write_bytes(b'{"text": "good"}')
    run(options)
    assert before.items() < seen.items()
    assert len(seen) == len(before) + 1


def prepare_script(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/prepare_data.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def test_standard_input_is_read_and_the_command_line_checked(
    tmp_path: Path, tokenizer: Path
) -> None:
    arguments = ("-", "--stdin", ".jsonl", "--tokenizer", str(tokenizer), "--out")
    done = prepare_script(
        *arguments,
        str(tmp_path / "d"),
        *("--val_fraction", "0.2", "--workers", "1"),
        input=json_lines(TEXTS[:60]).decode(),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(all_documents(open_dataset(tmp_path / "d"))) == sorted(TEXTS[:60])


def test_a_full_disk_is_one_line_and_leaves_no_dataset(tmp_path: Path, tokenizer: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    (tmp_path / "a.txt").write_text("".join(f"{i} is a number\n" for i in range(20_000)))
    done = prepare_script(
        str(tmp_path / "a.txt"),
        *("--tokenizer", str(tokenizer), "--out", str(tmp_path / "d"), "--workers", "1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'd'}: File too large")
    assert not (tmp_path / "d").exists()


def test_twenty_kills_and_a_rerun_give_the_same_bytes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child is killed when it reads a part for the n-th time: while parts are made, while the
    table is, and while the dataset is written.
    """
    monkeypatch.setattr("mc_ds.data.text.readers.LINES_BYTES", 2000)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 2000)
    run(options, out=tmp_path / "whole")
    context = multiprocessing.get_context("fork")  # the children have no server of their own
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    parts = []
    for kill in range(1, 21):
        if (child := os.fork()) == 0:
            run_until_killed(options, kill)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == -signal.SIGKILL, "killed before the end"
        assert not options.out.exists()
        parts.append(len(list((tmp_path / "dataset.parts").glob("*.safetensors"))))
    assert parts[0] < parts[-1]
    assert parts == sorted(parts)
    run(options)
    assert content_of(options.out) == content_of(tmp_path / "whole")
    assert list(tmp_path.glob("dataset.*")) == []


@pytest.mark.slow  # twenty programs and more, of seconds each
def test_kills_at_any_moment_and_a_rerun_give_the_same_bytes(
    tmp_path: Path, tokenizer: Path
) -> None:
    """The command itself, with two workers; after a finish it begins again from nothing."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(some_texts(25_000)))
    command = [sys.executable, "tools/prepare_data.py", str(tmp_path / "a.jsonl"), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer), "--val_fraction", "0.2", "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    expected = content_of(tmp_path / "whole")
    out, rng = tmp_path / "dataset", random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen([*command, str(out)], cwd=ROOT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, seconds))
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        kills += killed
        assert killed or process.returncode == 0
        if out.exists():  # finished, or killed when it was published
            assert content_of(out) == expected
            shutil.rmtree(out)
    subprocess.run([*command, str(out)], cwd=ROOT, check=True)
    assert content_of(out) == expected
    assert [path.name for path in tmp_path.glob("dataset*")] == ["dataset"]


def run_until_killed(options: PrepareOptions, number: int) -> NoReturn:
    """Prepare, and kill this process at its n-th reading of a part."""
    left, read_part = number, prepare.read_part

    def count(*args: Any, **kwargs: Any) -> Part:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_part(*args, **kwargs)

    try:
        prepare.read_part = count
        run(options)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
