"""What the other tests rely on."""

import os
from pathlib import Path

import pytest

from tests.support.tiny_run import ROOT, environment, python_path


def test_processes_of_tests_keep_the_path_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment modules make packages known by PYTHONPATH: what tests start needs it as much
    as the tests.
    """
    monkeypatch.setenv("PYTHONPATH", "/modules/torch:/modules/numpy")
    assert python_path(ROOT).split(os.pathsep) == [str(ROOT), "/modules/torch", "/modules/numpy"]
    assert environment(tmp_path)["PYTHONPATH"].endswith(f"{ROOT}:/modules/torch:/modules/numpy")
    monkeypatch.delenv("PYTHONPATH")
    assert python_path(ROOT) == str(ROOT)
