"""Packages that the tests use where they are installed: the extras of `pyproject.toml`."""

import tomllib
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support.processes import ROOT


def extra_of(package: str) -> str:
    """The extra of this project that installs a package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in extras["optional-dependencies"].items():
        if any(requirement.startswith(f"{package}>=") for requirement in requirements):
            return str(extra)
    raise LookupError(f"{package} is in no extra of pyproject.toml")


def missing(package: str) -> str:
    """Why a test of a package is skipped; empty where it is installed."""
    if find_spec(package) is not None:
        return ""
    return f"{package} is not installed: pip install 'mc_ds[{extra_of(package)}]'"


def needs(package: str) -> pytest.MarkDecorator:
    """A mark of tests that only run where a package is installed, which the program uses."""
    return pytest.mark.skipif(bool(missing(package)), reason=missing(package))


def needs_of(policy: str) -> None:
    """Skip the test where what a policy needs is not installed."""
    if policy in ("bm25", "ngram"):
        optional("bm25s")


def optional(module: str) -> Any:
    """A module of an optional package. Skips the test, or at the top of a file all of them, where
    the package is not installed; one that is installed and broken is an error.
    """
    if reason := missing(module.partition(".")[0]):
        pytest.skip(reason, allow_module_level=True)
    return import_module(module)
