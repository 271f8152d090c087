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


def optional(module: str) -> Any:
    """A module of an optional package. Skips the test, or at the top of a file all of them, where
    the package is not installed; one that is installed and broken is an error.
    """
    package = module.partition(".")[0]
    reason = f"{package} is not installed: pip install 'mc_ds[{extra_of(package)}]'"
    if find_spec(package) is None:
        pytest.skip(reason, allow_module_level=True)
    return import_module(module)
