"""Fixtures that tests of several rooms share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def _process_group() -> Iterator[torch.device]:
    """One gloo process group of one process for the whole session. Leaves the environment as it was."""
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
    """This process as rank 0 of 1, with the environment DeepSpeed's engine reads; nothing needs to be set by whoever runs the tests.

    Returns the device. The variables are gone after the test, so that processes which other tests start find their own way.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return _process_group
