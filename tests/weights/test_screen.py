"""No file of a checkpoint that could run code is unpickled in full, nor one that cannot be
screened.
"""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_ds.weights.checkpoint.screen import problem_of_pickles


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sprung}",)


def plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def before_zip(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files of data alone, one of them in a folder, and one that is no pickle."""
    folder = tmp_path / "step_00000004"
    (folder / "zero").mkdir(parents=True)
    for name in ("a.pt", "zero/fp32.pt"):
        torch.save({"x": torch.ones(3), "lr": 0.1}, folder / name)
    (folder / "trainer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("save", [torch.save, before_zip, plain])
@pytest.mark.parametrize("name", ["b.pt", "zero/fp32.pt"])
def test_a_file_that_would_run_a_command_is_named_and_not_run(
    checkpoint: Path, save: Callable[[Any, Path], None], name: str
) -> None:
    assert problem_of_pickles(checkpoint) is None
    sprung = checkpoint.parent / "sprung"
    save({"more": Command(sprung)}, checkpoint / name)
    problem = problem_of_pickles(checkpoint)
    assert problem is not None
    assert problem.startswith(f"{checkpoint / name} ")
    shares = [problem_of_pickles(checkpoint, share, 2) for share in range(2)]
    assert sorted(shares, key=str) == sorted([None, problem], key=str)
    assert not sprung.exists()
    with suppress(RuntimeError):  # that a plain pickle is no checkpoint, after it was read
        torch.load(checkpoint / name, weights_only=False)
    assert sprung.exists()  # this is what it would have done


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder_elsewhere(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("name", "make"), [("b.pt", pipe), ("b.pt", device), ("more", folder_elsewhere)]
)
def test_what_cannot_be_screened_is_named(
    checkpoint: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(checkpoint / name)
    problem = f"{checkpoint / name} is not a regular file and cannot be screened"
    assert problem_of_pickles(checkpoint) == problem


def test_links_to_files_are_screened_as_files(checkpoint: Path) -> None:
    (checkpoint / "b.pt").symlink_to(checkpoint / "a.pt")
    (checkpoint / "notes").symlink_to(checkpoint / "trainer.json")
    assert problem_of_pickles(checkpoint) is None
