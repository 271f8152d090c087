"""The tree on disk: what was committed is there again whatever happened, and what does not fit is
refused in one line.
"""

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mc_ds.config import ConfigError
from mc_ds.inference.tree import checksums
from mc_ds.inference.tree.disk import DiskTree, open_tree
from mc_ds.inference.tree.file_rows import FileRows
from mc_ds.inference.tree.folder import header_text
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.tree import MegaContextTree
from tests.support.faulty_disk import Died, FaultyDisk, lay
from tests.support.processes import ROOT, inherited
from tests.support.trees import (
    HASHES,
    PIECE_BYTES,
    assert_same,
    levels,
    networks,
    stream,
    tree_nets,
)

NETS = tree_nets()


def disk_tree(folder: Path, nets: TreeNets = NETS, **options: Any) -> DiskTree:
    return DiskTree(folder, nets, **{**HASHES, **options})


def in_memory(tokens: list[int]) -> MegaContextTree:
    tree = RamTree(NETS)
    tree.append(tokens)
    return tree


@functools.cache
def fresh(count: int) -> MegaContextTree:
    """The first tokens of the stream in memory."""
    return in_memory(stream(0, count))


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    """Even small trees have whole pieces."""
    with pytest.MonkeyPatch.context() as patch:  # its own: tests undo theirs
        patch.setattr(checksums, "PIECE_BYTES", PIECE_BYTES)
        yield


@pytest.fixture
def tree_of_90(tmp_path: Path) -> Path:
    with disk_tree(tmp_path / "tree") as tree:
        tree.append(stream(0, 90))
    return tmp_path / "tree"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reopened_tree_is_the_tree_that_was_closed(tmp_path: Path, dtype: torch.dtype) -> None:
    net, lens = networks()
    nets, memory = TreeNets.of(net.to(dtype), lens), RamTree(TreeNets.of(net, lens))
    for first, last in ((0, 50), (50, 51), (51, 90), (90, 200)):
        memory.append(stream(first, last))
        with disk_tree(tmp_path / "tree", nets) as tree:
            assert len(tree) == tree.committed == first
            tree.append(stream(first, last))
            assert_same(tree, memory, exact=True)
    with disk_tree(tmp_path / "tree", nets) as tree:
        assert_same(tree, memory, exact=True)
        assert torch.equal(tree.index_table(1), memory.index_table(1))
        assert torch.equal(tree.index_table(1, 7, 20), memory.index_table(1)[7:20])


def test_what_was_not_committed_is_gone_and_cut_off(tree_of_90: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in tree_of_90.iterdir()}
    with contextlib.suppress(KeyboardInterrupt), disk_tree(tree_of_90) as tree:
        tree.append(stream(90, 300))
        assert (tree_of_90 / "gists.1").stat().st_size > sizes["gists.1"]
        assert tree.committed == 90
        raise KeyboardInterrupt
    (tree_of_90 / "header.json.partial-0123456789abcdef").write_text('{"form')
    tree = disk_tree(tree_of_90)
    sizes["lock"] = (tree_of_90 / "lock").stat().st_size
    assert {path.name: path.stat().st_size for path in tree_of_90.iterdir()} == sizes
    assert_same(tree, in_memory(stream(0, 90)), exact=True)
    tree.append(stream(1000, 1100))
    assert_same(tree, in_memory(stream(0, 90) + stream(1000, 1100)))


def test_a_tree_commits_by_itself_while_it_grows(tmp_path: Path) -> None:
    tree = disk_tree(tmp_path / "tree", commit_tokens=100, batch_tokens=40)
    tree.append(stream(0, 390))
    assert tree.committed == 360  # after the batches that end at 120, 240 and 360
    for token in stream(390, 463):
        tree.append([token])
    assert tree.committed == 460


def test_open_tree_makes_either_kind(tmp_path: Path) -> None:
    for where, kind in (
        ("ram", RamTree),
        (str(tmp_path / "a"), DiskTree),
        (tmp_path / "b", DiskTree),
    ):
        with open_tree(where, NETS, **HASHES) as tree:
            assert type(tree) is kind
            tree.append(stream(0, 30))
            assert_same(tree, in_memory(stream(0, 30)))


def test_copies_between_memory_and_disk(tmp_path: Path) -> None:
    memory, again = in_memory(stream(0, 90)), RamTree(NETS)
    with disk_tree(tmp_path / "tree") as tree:
        memory.copy_into(tree)
    with disk_tree(tmp_path / "tree") as tree:
        assert_same(tree, memory, exact=True)
        tree.copy_into(again)
    assert_same(again, memory, exact=True)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(gistnet_hash="c" * 64),
            "was made with GistNet aaaaaaaaaaaa, but this model has cccccccccccc: open it with the "
            "bundle",
        ),
        (
            dict(index_hash="d" * 64),
            "was made with the index bbbbbbbbbbbb, but this model has dddddddddddd",
        ),
        (
            dict(nets=tree_nets(block_size=3, train_wc_length=60)),
            "was made with block_size 4, but this model has 3",
        ),
        (dict(nets=tree_nets(max_lod=3)), "was made with max_lod 2, but this model has 3"),
        (
            dict(nets=tree_nets(lens_dim=16)),
            "was made with index vectors of width 8, but this model has 16",
        ),
        (
            dict(nets=tree_nets(lens_index=False)),
            "was made with index vectors of width 8, but this model has 0",
        ),
        (
            dict(nets=TreeNets.of(networks()[0].bfloat16(), networks()[1])),
            "was made with gists in float32, but this model has bfloat16",
        ),
    ],
)
def test_a_tree_of_other_networks_is_refused(
    tree_of_90: Path, options: dict[str, Any], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in tree_of_90.iterdir() if path.name != "lock"}
    with pytest.raises(ConfigError, match=message) as refusal:
        disk_tree(tree_of_90, **options)
    assert "\n" not in str(refusal.value)
    assert {
        path.name: path.read_bytes() for path in tree_of_90.iterdir() if path.name != "lock"
    } == before
    assert len(disk_tree(tree_of_90)) == 90  # and the lock is free again


def change_header(folder: Path, **changes: Any) -> None:
    header = json.loads((folder / "header.json").read_text())
    del header["crc32"]
    (folder / "header.json").write_text(header_text({**header, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tree: change_header(tree, format=3),
            "has format 3, but this version of mc_ds reads 2",
        ),
        (
            lambda tree: change_header(tree, byte_order="big"),
            "was made with byte_order big, but this model has little",
        ),
        (
            lambda tree: change_header(tree, tokens=-1),
            "header.json is damaged: tokens = -1 is not a count; restore it from a copy, or ingest",
        ),
        (
            lambda tree: change_header(tree, tails=[1]),
            r"header.json is damaged: tails = \[1\] are not checksums; restore",
        ),
        (lambda tree: change_header(tree, tokens="90"), "header.json is damaged: tokens = '90'"),
        (lambda tree: (tree / "header.json").unlink(), "holds data but header.json is missing"),
        (lambda tree: os.truncate(tree / "header.json", 40), "header.json is damaged"),
        (lambda tree: (tree / "header.json").write_bytes(b""), "header.json is damaged"),
        (
            lambda tree: (tree / "header.json").write_bytes(b"\xff\x00" * 50),
            "header.json is damaged",
        ),
        (lambda tree: (tree / "header.json").write_text("[]"), "header.json is damaged"),
        (
            lambda tree: (tree / "gists.2").unlink(),
            "is damaged: gists.2 has 0 bytes, but 90 tokens need 320",
        ),
        (
            lambda tree: os.truncate(tree / "tokens", 4 * 90 - 1),
            "is damaged: tokens has 359 bytes, but 90 tokens need 360",
        ),
        (
            lambda tree: os.truncate(tree / "index.1", 4),
            "is damaged: index.1 has 4 bytes, but 90 tokens need 704",
        ),
        (
            lambda tree: (tree / "index.1.sums").unlink(),
            "is damaged: index.1.sums has 0 bytes, but 90 tokens need 20",
        ),
    ],
)
def test_a_damaged_tree_is_refused(tree_of_90: Path, damage: Any, message: str) -> None:
    damage(tree_of_90)
    with pytest.raises(ConfigError, match=message) as refusal:
        disk_tree(tree_of_90)
    assert "\n" not in str(refusal.value)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"is not a tree \(it holds notes\.txt\): give a new or empty folder"
    ):
        disk_tree(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="is a file: give a folder for the tree"):
        disk_tree(tmp_path / "notes.txt")


def test_one_process_at_a_time(tree_of_90: Path) -> None:
    tree = disk_tree(tree_of_90)
    with pytest.raises(
        ConfigError, match=f"is already open in process {os.getpid()} on .*: close it there first"
    ):
        disk_tree(tree_of_90)
    other = f"""
from pathlib import Path
from mc_ds.storage import Lock, LockHeldError
try:
    Lock(Path({str(tree_of_90 / "lock")!r}))
except LockHeldError as error:
    print(error.owner)
"""
    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"process {os.getpid()} on ")
    tree.close()
    disk_tree(tree_of_90).close()


# Faults


def interrupted_life(folder: Path) -> Iterator[tuple[int, int]]:
    """A tree's life with all that writes: yields the tokens that must be there from now on, and
    those that may be.
    """
    yield 0, 0
    tree = disk_tree(folder, batch_tokens=16)
    for count, commits in ((10, True), (11, False), (37, True), (70, False), (71, True)):
        yield tree.committed, count if commits else tree.committed
        tree.append(stream(len(tree), count))
        if commits:
            tree.commit()
    yield 50, 71  # a durable truncation is under way
    tree.truncate(50)
    yield 50, 50
    tree.append(stream(50, 90))
    yield 50, 90
    tree.close()
    yield 90, 90


def test_death_at_every_system_call_loses_nothing_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or cut off from power with any unflushed write lost: reopened, the tree has a
    committed state and grows as if nothing was.
    """
    number, seen = 0, set[Any]()
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(tmp_path / f"{number}", patch)
            disk.dies_at = number
            steps = [(0, 0)]
            with contextlib.suppress(Died):
                steps.extend(interrupted_life(disk.folder))
            killed = disk.left_by_a_kill()
            cut = [disk.left_by_a_power_cut(names_are_kept=kept) for kept in (False, True)]
        if disk.calls < number:
            break
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # saves time
        for content in (killed, *cut):
            case = (steps[-1], tuple(sorted(content.items())))
            if case in seen:
                continue
            seen.add(case)
            tree = disk_tree(lay(tmp_path / f"case-{len(seen)}", content))
            assert len(tree) in steps[-1], number
            assert_same(tree, fresh(len(tree)))
            tree.append(stream(len(tree), 100))
            assert_same(tree, fresh(100))
            tree.close()
            shutil.rmtree(tree.folder)
    assert number > 80  # the life has that many moments


def test_nothing_that_is_committed_is_ever_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pwrite, writes = tmp_path / "tree", os.pwrite, []
    row_bytes = {
        "tokens": (0, 4),
        "gists.1": (1, 64),
        "gists.2": (2, 64),
        "index.1": (1, 32),
        "index.2": (2, 32),
    }
    rows_of_sum = {f"{name}.sums": PIECE_BYTES // size for name, (_, size) in row_bytes.items()}

    def watched(handle: int, data: memoryview, offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        level, size = row_bytes[name.removesuffix(".sums")]
        rows = json.loads((folder / "header.json").read_text())["tokens"] // 4**level
        if name in rows_of_sum:
            writes.append((name, offset // 4 - rows // rows_of_sum[name]))
        else:
            writes.append((name, offset // size - rows))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    for _ in interrupted_life(folder):
        pass
    assert {name for name, _ in writes} == {*row_bytes, *rows_of_sum}
    assert min(rows_after_committed for _, rows_after_committed in writes) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_leaves_the_committed_tree_whole_and_going_on_is_possible(
    small_disk: Path,
) -> None:
    tree = disk_tree(small_disk / "tree", batch_tokens=40)
    tree.append(stream(0, 403))
    tree.commit()
    with pytest.raises(
        OSError, match="No space left on device; the tree keeps its 403 committed tokens"
    ) as full:
        tree.append(stream(403, 5000))
    assert full.value.errno == errno.ENOSPC
    reached = len(tree)
    assert 403 < reached < 5000
    assert_same(tree, in_memory(stream(0, reached)))
    shutil.copytree(small_disk / "tree", small_disk.parent / "copy")
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    tree.append(stream(reached, 5000))
    tree.close()
    with disk_tree(small_disk / "tree") as tree:
        assert_same(tree, in_memory(stream(0, 5000)))
    with disk_tree(small_disk.parent / "copy") as tree:
        assert_same(tree, in_memory(stream(0, 403)))


def grow_and_commit(tree: DiskTree) -> None:
    tree.append(stream(len(tree), 200))
    tree.commit()


def test_a_tree_on_a_full_disk_can_be_read(small_disk: Path) -> None:
    with disk_tree(small_disk / "tree") as tree:
        tree.append(stream(0, 90))
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(512)):
            pass
    assert_same(disk_tree(small_disk / "tree"), fresh(90), exact=True)


@pytest.mark.parametrize(
    "file",
    ["tokens", "gists.1", "gists.2", "index.1", "index.2", "index.1.sums", "header.json"],
)
def test_a_write_that_fails_is_told_and_can_be_done_again(
    tree_of_90: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """For whoever may not mount: every file in turn does not fit."""
    tree, pwrite, fsync = disk_tree(tree_of_90), os.pwrite, os.fsync

    def full(handle: int, data: memoryview | None = None, offset: int = 0) -> int | None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name.partition(".partial")[0] == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(handle) if data is None else pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    if file == "header.json":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="No space left on device; the tree keeps its 90 committed tokens"
    ) as error:
        grow_and_commit(tree)
    assert str(error.value).count("committed") == 1
    assert tree.committed == 90
    monkeypatch.undo()
    grow_and_commit(tree)
    assert tree.committed == 200
    assert_same(tree, in_memory(stream(0, 200)))


def test_after_a_failed_flush_nothing_more_is_committed(
    tree_of_90: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have dropped the pages: a second flush that succeeds would prove nothing."""
    tree = disk_tree(tree_of_90)
    tree.append(stream(90, 120))

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error; the tree keeps its 90 committed tokens"):
        tree.commit()
    monkeypatch.undo()
    with pytest.raises(OSError, match="an earlier flush failed"):
        tree.commit()
    with pytest.raises(OSError, match="an earlier flush failed"):
        tree.close()
    with disk_tree(tree_of_90) as again:
        assert len(again) == 90


def log_lines(log: Path) -> list[int]:
    """What ingesting processes have said to be committed (of a last line cut short, what there is
    is less).
    """
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def kill_ingesting_processes(folder: Path, calls: Sequence[int]) -> None:
    """Each process dies in the middle of its system call of that number. After every death the tree
    is reopened and looked at; in the end it is compared as a whole with a fresh one.
    """
    log = folder.with_suffix(".log")
    worker = [sys.executable, str(ROOT / "tests" / "support" / "tree_worker.py")]
    with subprocess.Popen(
        worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=inherited()
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None
        counts = [0]
        for call in calls:
            print(call, folder, file=starter.stdin)
            assert int(starter.stdout.readline()) == -signal.SIGKILL
            committed = max([0, *log_lines(log)])
            with disk_tree(folder) as tree:
                counts.append(len(tree))
                assert max(counts[-2], committed) <= counts[-1]
                assert tree.tokens(0, len(tree)).tolist() == stream(0, len(tree))
                if counts[-1] > 32:
                    check_the_end(tree)
        starter.stdin.close()
    assert len(set(counts)) > len(calls) / 2, "the calls are chosen so that most processes commit"
    with disk_tree(folder) as tree:
        tree.append(stream(len(tree), counts[-1] + 77))
        assert_same(tree, in_memory(stream(0, counts[-1] + 77)))


def check_the_end(tree: MegaContextTree) -> None:
    """The last nodes of each level, where a torn write would show, are those of their tokens."""
    first = tree.level_len(2) // 2 * 32
    first = max(0, first - 32 * 4)
    fresh = in_memory(stream(first, len(tree)))
    for level, (gists, index) in enumerate(levels(fresh), start=1):
        nodes = torch.arange(len(gists)) + first // 4**level
        torch.testing.assert_close(
            (tree.gists(level, nodes), tree.index(level, nodes)),
            (gists, index),
            atol=1e-5,
            rtol=1e-5,
        )


def test_killed_three_times(tmp_path: Path) -> None:
    kill_ingesting_processes(tmp_path / "tree", [25, 60, 131])


@pytest.mark.slow
def test_killed_20_times(tmp_path: Path) -> None:
    rng = random.Random(20)
    kill_ingesting_processes(tmp_path / "tree", [rng.randrange(1, 400) for _ in range(20)])


# Everything together


class TreeLife(RuleBasedStateMachine):
    """Any order of appending, cutting, committing, closing and dying."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(os.environ["TREE_LIFE"]) / f"{random.getrandbits(64):x}"
        self.committed: list[int] = []
        self.open()

    def open(self) -> None:
        self.tree, self.tokens = (
            disk_tree(self.folder, commit_tokens=10**6, batch_tokens=20),
            list(self.committed),
        )

    @rule(count=st.integers(0, 45), first=st.integers(0, 1000))
    def append(self, count: int, first: int) -> None:
        self.tree.append(stream(first, first + count))
        self.tokens += stream(first, first + count)

    @rule(dropped=st.integers(0, 4) | st.integers(0, 200))
    def truncate(self, dropped: int) -> None:
        count = max(0, len(self.tokens) - dropped)
        self.tree.truncate(count)
        del self.tokens[count:]
        del self.committed[count:]

    @rule()
    def commit(self) -> None:
        self.tree.commit()
        self.committed = list(self.tokens)

    @rule()
    def close_and_open(self) -> None:
        self.tree.close()
        self.committed = list(self.tokens)
        self.open()

    @rule()
    def die_and_open(self) -> None:
        self.tree._release()
        self.open()

    @precondition(lambda self: len(self.tokens) > 0)
    @rule(share=st.floats(0, 1))
    def read(self, share: float) -> None:
        place = round(share * (len(self.tokens) - 1))
        assert self.tree.tokens_at(torch.tensor([place])).tolist() == [self.tokens[place]]

    @invariant()
    def lengths_agree(self) -> None:
        assert len(self.tree) == len(self.tokens)
        assert self.tree.committed == len(self.committed)

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            assert_same(self.tree, in_memory(self.tokens))
            self.tree.close()
            shutil.rmtree(self.folder)


def test_any_life_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREE_LIFE", str(tmp_path))
    TreeLife.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    TreeLife.TestCase().runTest()


# Memory


def test_pages_that_were_read_do_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileRows, "RESIDENT_BYTES", 1000)
    monkeypatch.setattr(FileRows, "FAULT_BYTES", 0)
    rows = FileRows(tmp_path / "rows", 10, torch.float32)  # 40 bytes a row
    rows.write(0, torch.arange(1000.0).view(100, 10))
    first = rows.between(0, 20)
    assert (
        rows.at(torch.tensor([99, 0])).tolist()
        == torch.arange(1000.0).view(100, 10)[[99, 0]].tolist()
    )
    again = rows.between(0, 20)
    assert (
        again.data_ptr() != first.data_ptr()
    )  # a new map, as 1,000 bytes were passed; the old one lives while its view does
    assert torch.equal(first, again)


def resident(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "tools/bench/tree.py", *arguments]
    return json.loads(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
def test_a_long_history_on_disk_takes_little_memory(tmp_path: Path) -> None:
    """However much is appended at once (2 GB of embeddings here), and though all of the index is
    searched.
    """
    sizes = dict(tokens=1_000_000, dim=512, lens_dim=512, gist_dim=32, gist_layers=1)
    found = resident(
        f"--tree={tmp_path / 'tree'}", *(f"--{name}={value}" for name, value in sizes.items())
    )
    assert found["tokens"] == 1_000_000
    assert sum(found["files_mb"].values()) > 128
    assert found["ingest_peak_mb"] < 400
    assert found["use_peak_mb"] < 400
