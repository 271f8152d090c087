"""What a disk gives back of a tree is what was written, or is refused in one line."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.inference.tree import checksums
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.tree import MegaContextTree
from tests.support.trees import HASHES, PIECE_BYTES, assert_same, levels, stream, tree_nets

NETS = tree_nets()
DATA = ("tokens", "gists.1", "gists.2", "index.1", "index.2")


def disk_tree(folder: Path) -> DiskTree:
    return DiskTree(folder, NETS, **HASHES)


def in_memory(tokens: list[int]) -> MegaContextTree:
    tree = RamTree(NETS)
    tree.append(tokens)
    return tree


def read_all(folder: Path) -> None:
    with disk_tree(folder) as tree:
        tree.tokens(0, len(tree))
        levels(tree)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 tokens, two gists, four index vectors."""
    monkeypatch.setattr(checksums, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tree of 330 tokens that was written in several sittings and cut back once."""
    for first, last in ((0, 90), (90, 91), (91, 400), (300, 330)):
        with disk_tree(tmp_path / "tree") as tree:
            tree.truncate(first)
            tree.append(stream(first, last))
    disk_tree(tmp_path / "tree").close()  # cuts off what lies behind the committed rows
    return tmp_path / "tree"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(content)


def test_125_of_125_flipped_bytes_of_the_data_are_noticed(folder: Path, tmp_path: Path) -> None:
    rng, noticed = random.Random(125), 0
    for name in DATA:
        for place in rng.sample(range((folder / name).stat().st_size), 25):
            damaged = shutil.copytree(folder, tmp_path / f"{name}-{place}")
            flip(damaged / name, place)
            with pytest.raises(
                ConfigError, match=rf"of {name} do not match their checksum; restore"
            ):
                read_all(damaged)
            noticed += 1
    assert noticed == 125
    with disk_tree(folder) as tree:
        assert_same(tree, in_memory(stream(0, 330)))


@pytest.mark.parametrize("name", ["header.json", *(f"{name}.sums" for name in DATA)])
def test_flipped_bytes_of_header_and_checksums_are_noticed(
    folder: Path, tmp_path: Path, name: str
) -> None:
    size = (folder / name).stat().st_size
    for place in range(0, size, 1 + size // 40):
        damaged = shutil.copytree(folder, tmp_path / f"{place}")
        flip(damaged / name, place)
        with pytest.raises(ConfigError, match=r"is damaged|has format|was made with|is byte"):
            read_all(damaged)


def test_a_piece_is_verified_when_it_is_first_read(folder: Path) -> None:
    """Opening reads the last incomplete piece of a file alone; whoever reads no damage is served."""
    flip(folder / "gists.1", 10 * 64)
    tree = disk_tree(folder)
    wanted = in_memory(stream(0, 330)).gists(1, torch.tensor([3, 12, 81]))
    torch.testing.assert_close(tree.gists(1, torch.tensor([3, 12, 81])), wanted)
    with pytest.raises(ConfigError, match=r"rows 10 to 12 of gists\.1 do not match") as error:
        tree.gists(1, torch.tensor([3, 11, 81]))
    assert "\n" not in str(error.value)


def test_a_piece_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(handle: int, size: int, first: int) -> bytes:
        read.append(size)
        return pread(handle, size, first)

    monkeypatch.setattr(os, "pread", counted)
    tree = disk_tree(folder)
    sizes = {name: (folder / name).stat().st_size for name in DATA}
    sums = sum((folder / f"{name}.sums").stat().st_size for name in DATA)
    assert sum(read) == sum(size % PIECE_BYTES for size in sizes.values()) + sums
    for _ in range(2):
        tree.tokens(0, len(tree))
        levels(tree)
        tree.index_table(1)
    assert sum(read) == sum(sizes.values()) + sums


@pytest.mark.parametrize(
    ("damaged", "change"),
    [
        ("tokens", lambda tree: tree.truncate(310)),  # in a piece whose end goes
        ("gists.2", lambda tree: tree.truncate(300)),
        ("gists.1", lambda tree: tree.append(stream(330, 350))),  # children of a new gist
    ],
)
def test_nothing_is_made_of_damaged_data(
    folder: Path, damaged: str, change: Callable[[MegaContextTree], object]
) -> None:
    """Otherwise a new checksum would cover the damage, or a gist hold it."""
    with disk_tree(folder) as tree:
        tree.truncate(328)
    places = {"tokens": 4 * 300, "gists.2": 64 * 18, "gists.1": 64 * 81}
    flip(folder / damaged, places[damaged])
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(ConfigError, match=rf"of {damaged} do not match"):
        change(disk_tree(folder))
    assert before[folder / "header.json"] == (folder / "header.json").read_bytes()


def test_a_cut_that_fails_leaves_a_tree_that_grows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tree = disk_tree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="keeps its 330 committed tokens"):
            tree.truncate(100)
    tree.append(stream(330, 500))
    tree.close()
    with disk_tree(folder) as again:
        assert_same(again, in_memory(stream(0, 500)))
