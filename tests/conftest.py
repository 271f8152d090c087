"""Fixtures that tests of several rooms share."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from tests.support.gpus import hide_gpus, pytest_pyfunc_call, pytest_runtest_setup
from tests.support.processes import share_python_path

# torch's compiler would take code for another instruction set from its cache.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"),
    )
hide_gpus()
share_python_path()

__all__ = ["pytest_pyfunc_call", "pytest_runtest_setup"]

# The same examples each time and no limits of time: what fails has been changed. Other examples:
# --hypothesis-profile=default.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")
# For mutation testing: it only matters whether an example fails, not which one is the simplest.
settings.register_profile(
    "mutants", settings.get_profile("steady"), phases=[Phase.explicit, Phase.generate]
)


@pytest.fixture(scope="session")
def _process_group() -> Iterator[torch.device]:
    """One gloo process group of one process for the whole session. Leaves the environment as it
    was.
    """
    import torch.distributed as dist

    from mc_ds.training.ranks.distributed import read_rank_environment, start_distributed

    before = dict(os.environ)
    device = start_distributed(read_rank_environment({}))
    os.environ.clear()
    os.environ.update(before)
    yield device
    dist.destroy_process_group()


@pytest.fixture
def single_process(_process_group: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """This process as rank 0 of 1, with the environment DeepSpeed's engine reads; nothing needs
    to be set by whoever runs the tests.

    Returns the device. The variables are gone after the test, so that processes which other
    tests start find their own way.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return _process_group


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets networks that were made `double()` compute in float64 throughout: where they ask for
    float32 they get float64.

    What differs by mathematics then differs by far more than 1e-12, what differs by rounding
    alone by less.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
