"""Statistics reduce exactly: micro-steps and ranks together equal one big batch."""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.metrics import Statistics
from tests.support.tiny_run import TIMEOUT_S

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


def observe(values: list[float], statistics: Statistics | None = None) -> Statistics:
    """One of each reduction over `values`, also into what has been recorded before; those below
    -50 are masked.
    """
    statistics, x = statistics or Statistics(), torch.tensor(values, dtype=torch.float64)
    kept = x >= -50
    statistics.add_mean("mean", (x * kept).sum(), kept.sum())
    statistics.add_sum("sum", x.sum())
    statistics.add_max("max", x, kept)
    statistics.add_min("min", x, kept)
    statistics.add_samples("sample", x, kept)
    return statistics


def expected(values: list[float]) -> dict[str, float]:
    kept = np.array([value for value in values if value >= -50])
    if not len(kept):
        return {"sum": sum(values)}
    return {
        "max": kept.max(),
        "mean": kept.mean(),
        "min": kept.min(),
        "sample_mean": kept.mean(),
        "sample_p95": np.quantile(kept, 0.95),
        "sample_std": kept.std(),
        "sum": sum(values),
    }


@settings(max_examples=60, deadline=None)
@given(numbers, numbers)
def test_merged_parts_equal_the_whole(first: list[float], second: list[float]) -> None:
    merged = observe(first).merge(observe(second))
    assert merged.record() == pytest.approx(expected(first + second), abs=1e-9)
    in_place = observe(second, observe(first))
    assert in_place.record() == pytest.approx(expected(first + second), abs=1e-9)


def test_a_ratio_of_sums_is_not_a_mean_of_ratios() -> None:
    few, many = Statistics(), Statistics()
    few.add_mean("loss", 3.0, 1)
    many.add_mean("loss", 9.0, 9)
    many.add_mean("only_here", 1.0, 2)
    assert few.merge(many).record() == {"loss": 1.2, "only_here": 0.5}


def test_numbers_are_recorded_on_the_device_of_the_statistics() -> None:
    """Also by those that two micro-steps, or the parts in one vector, were combined into."""
    statistics = Statistics(device="meta")
    statistics.add_sum("steps", 1)
    again = Statistics.from_flat(statistics.flat())
    for combined in (statistics, statistics.merge(Statistics()), again):
        combined.add_mean("loss", 3.0, 1)
        packed = combined.pack()
        assert packed.names == ("steps", "loss")
        assert packed.table.is_meta
    empty = Statistics(device="meta")
    assert empty.flat().vector.is_meta
    assert empty.flat().vector.dtype == torch.float64
    table = empty.pack().table
    assert table.is_meta
    assert table.shape == (0, 2)
    assert table.dtype == torch.float64


def test_what_counted_nothing_is_left_out_and_never_nan() -> None:
    statistics = observe([-60.0, -70.0])
    values = statistics.values()
    assert set(values) == {"mean", "sum", "max", "min", "sample_mean", "sample_p95", "sample_std"}
    assert all(value == 0 for name, value in values.items() if name != "sum")
    assert statistics.record() == {"sum": -130.0}
    assert statistics.merge(observe([4.0])).record()["sample_p95"] == 4.0
    assert Statistics().record() == {}


def test_a_nan_that_was_measured_is_shown_and_one_that_was_masked_is_not() -> None:
    statistics = Statistics()
    statistics.add_samples("sample", torch.tensor([1.0, math.nan]), torch.tensor([True, False]))
    assert statistics.record() == {"sample_mean": 1.0, "sample_p95": 1.0, "sample_std": 0.0}
    statistics.add_mean("loss", math.nan, 1)
    assert math.isnan(statistics.record()["loss"])


def test_packed_metrics_are_one_tensor_of_values_and_presence() -> None:
    packed = observe([1.0, 3.0]).pack()
    assert packed.table.shape == (len(packed.names), 2) == (7, 2)
    record = packed.record()
    assert record["mean"] == 2.0
    assert list(record) == sorted(packed.names)


@settings(max_examples=30, deadline=None)
@given(numbers, st.integers(0, 5))
def test_one_vector_holds_all_parts(values: list[float], kinds: int) -> None:
    """Whatever kinds of parts there are, and however many samples, they reduce as before."""
    statistics = observe(values)
    for group in ("means", "sums", "maxima", "minima", "samples")[:kinds]:
        setattr(statistics, group, {})
    flat = statistics.flat()
    assert flat.vector.dim() == 1
    again = Statistics.from_flat(flat)
    assert again.record() == statistics.record()
    assert again.merge(statistics).record() == statistics.merge(statistics).record()


class Ranks:
    """Threads in the role of ranks, with the collectives that `all_reduce` uses."""

    def __init__(self, count: int) -> None:
        self.count, self.group, self.collectives = count, object(), 0
        self._given: dict[int, Tensor] = {}
        self._own, self._meeting = threading.local(), threading.Barrier(count, timeout=TIMEOUT_S)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Returns what `function` returns for each rank."""

        def of_rank(rank: int) -> Any:
            self._own.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._meeting.abort()  # the others need not wait
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(of_rank, range(self.count)))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._given[self._own.rank] = tensor.clone()
        if self._meeting.wait() == 0:
            self.collectives += 1
        parts = [self._given[rank] for rank in range(self.count)]
        self._meeting.wait()
        return parts

    def all_reduce(self, tensor: Tensor, op: Any, group: Any) -> None:
        assert group is self.group
        parts = torch.stack(self._exchange(tensor))
        tensor.copy_(parts.sum(0) if op == dist.ReduceOp.SUM else parts.amax(0))

    def all_gather_into_tensor(self, output: Tensor, tensor: Tensor, group: Any) -> None:
        assert group is self.group
        output.copy_(torch.cat(self._exchange(tensor)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.floats(-40, 40), min_size=3, max_size=3), min_size=2, max_size=4))
def test_any_number_of_ranks_equal_one(values: list[list[float]]) -> None:
    """In three collectives of the group that is given."""
    ranks = Ranks(len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda group: ranks.count if group else 1)
        patch.setattr(dist, "all_reduce", ranks.all_reduce)
        patch.setattr(dist, "all_gather_into_tensor", ranks.all_gather_into_tensor)
        found = ranks.run(lambda rank: observe(values[rank]).all_reduce(ranks.group))
        empty = ranks.run(lambda rank: Statistics(device="meta").all_reduce(ranks.group))
        alone = observe(values[0])
        assert alone.all_reduce() is alone, "of a single rank nothing is exchanged"
    assert ranks.collectives == 3
    whole = expected([value for own in values for value in own])
    for reduced in found:
        assert reduced.record() == pytest.approx(whole, abs=1e-9)
    assert [x.device for x in empty] == ["meta"] * ranks.count
    assert all(x.pack().names == () for x in empty)


def _rank(rank: int, store: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reduced = observe([1.0, 8.0, -60.0] if rank == 0 else [-3.0, 2.0, 30.0]).all_reduce()
    Statistics().all_reduce()  # nothing recorded: nothing to exchange
    torch.save(reduced.record(), f"{output}{rank}")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process whose interpreter is finalized


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    one = expected([1.0, 8.0, -60.0, -3.0, 2.0, 30.0])
    alone = observe([1.0])
    assert alone.all_reduce() is alone, "of a single process nothing is exchanged"
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}") == pytest.approx(one)
