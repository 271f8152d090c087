"""GPUs are hidden from the tests, which ask about the mathematics and run on the CPU of any
machine; a test marked `gpu` runs on one, by itself in a new process.

The CUDA runtime reads the environment at its first call, not when torch is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

ON_GPU = "TESTS_ON_GPU"
"""Set in the process of a test marked `gpu`."""
VISIBLE, VISIBLE_BEFORE = "CUDA_VISIBLE_DEVICES", "TESTS_CUDA_VISIBLE_DEVICES"
ALL = "all"
DRIVER = Path("/dev/nvidiactl")


def hide_gpus() -> None:
    """Hide them from this process and from those that it starts."""
    if ON_GPU in os.environ:
        return
    os.environ.setdefault(VISIBLE_BEFORE, os.environ.get(VISIBLE, ALL))
    os.environ[VISIBLE], os.environ["DS_ACCELERATOR"] = "", "cpu"


def gpu_environment() -> dict[str, str]:
    """The environment with the GPUs that were visible at the start."""
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    before = environ.pop(VISIBLE_BEFORE, ALL)
    if before == ALL:
        environ.pop(VISIBLE, None)
    else:
        environ[VISIBLE] = before
    return environ | {ON_GPU: "1"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") and ON_GPU not in os.environ and not DRIVER.exists():
        pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of a GPU in a process that sees it."""
    if ON_GPU in os.environ or not pyfuncitem.get_closest_marker("gpu"):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environ = {k: v for k, v in gpu_environment().items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, pyfuncitem.nodeid],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "1 skipped" in done.stdout:
        pytest.skip("needs other GPUs")
    assert "1 passed" in done.stdout, done.stdout
    return True
