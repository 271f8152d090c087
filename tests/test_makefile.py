"""The Makefile's commands, as `make --dry-run` prints them."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(*arguments: str) -> list[str]:
    """Lines of what make would run, whatever is up to date, and whatever make has started these tests."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MAKE", "MFLAGS"))
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_with_wheels_nothing_is_taken_from_a_network() -> None:
    installs = [line for line in commands("venv", "WHEELS=here") if " install " in line]
    assert len(installs) == 2
    for line in installs:
        assert f"--no-index --find-links '{ROOT}/here'" in line
    assert not [line for line in commands("venv") if "--no-index" in line]


def test_the_wheels_are_those_of_the_environment() -> None:
    *_, of_torch, of_the_rest, remove = commands("wheels")
    for line in (of_torch, of_the_rest):
        assert "pip --quiet wheel --wheel-dir wheels" in line
        assert "-c .venv/constraints.txt" in line
    assert "torch==" in of_torch
    assert "'setuptools>=77' '.[dev]'" in of_the_rest
    assert remove == "rm -f wheels/mc_ds-*.whl"
