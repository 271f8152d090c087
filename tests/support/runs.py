"""What a training run has left in its folder, and how long to wait for it."""

import json
from pathlib import Path
from typing import Any

import torch

from mc_ds.config.recipe import read_recipe
from mc_ds.training.checkpoint import list_checkpoints
from tests.support.hosts import wait_until


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self) -> list[str]:
        """The lines of the record, one per step from 1 on; with their timings no two are alike,
        so a step done twice shows.
        """
        path = self.folder / "metrics.jsonl"
        lines = (
            path.read_text().split("\n")[:-1] if path.exists() else []
        )  # the last may be half written
        trained = [line for line in lines if "train/loss" in json.loads(line)]
        assert [json.loads(line)["step"] for line in trained] == list(range(1, len(trained) + 1))
        return trained

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return [
            int(path.name.removeprefix("step_"))
            for path in list_checkpoints(self.folder / "checkpoints")
        ]

    def config(self) -> dict[str, Any]:
        """The resolved config that the run has saved."""
        return read_recipe(self.folder / "config.yaml")

    def wait_for_step(self, step: int, log: Path) -> None:
        """Waits until the record has that step."""
        wait_until(lambda: len(self.record()) >= step, f"step {step}", context=lambda: tail(log))


def tail(log: Path) -> str:
    """The end of a log, for the message of a failed test."""
    return log.read_text(errors="replace")[-6000:] if log.exists() else f"no {log}"


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{index}")
    elif isinstance(a, (int, float, str, bool, type(None))):
        assert a == b, where
