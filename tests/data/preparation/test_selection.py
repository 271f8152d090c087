"""Which documents are kept, and what would fill an empty split."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mc_ds.config import ConfigError
from mc_ds.data.preparation.selection import LEFT_OUT, TRAIN, VALIDATION, select
from mc_ds.data.preparation.table import ROW


def codes_of(folder: Path, keys: list[float], val_fraction: float) -> list[int]:
    """Codes of documents of 10 tokens whose keys are these shares of all keys."""
    rows = np.zeros(len(keys), ROW)
    rows["digest"] = np.arange(4 * len(keys), dtype="<u4").view("V16")
    rows["key"] = [int(key * 2.0**64) for key in keys]
    rows["tokens"] = 10
    rows.tofile(folder / "table")
    codes, _ = select(
        folder / "table", len(keys), min_tokens=2, max_tokens=None, val_fraction=val_fraction
    )
    return codes.tolist()


@pytest.mark.parametrize(
    ("keys", "val_fraction", "split", "share"),
    [
        ([0.3, 0.2504], 0.01, "validation", "0.251"),
        ([0.1014, 0.2236], 0.4, "training", "0.223"),
        ([0.1, 0.2], 0.4, "training", "0.200"),
    ],
)
def test_the_share_that_is_named_fills_both_splits(
    tmp_path: Path, keys: list[float], val_fraction: float, split: str, share: str
) -> None:
    with pytest.raises(ConfigError) as error:
        codes_of(tmp_path, keys, val_fraction)
    said = rf"none of 2 documents falls into the {split} split .*: use --val_fraction {share}, or more documents"
    assert re.fullmatch(said, str(error.value))
    assert sorted(codes_of(tmp_path, keys, float(share))) == [TRAIN, VALIDATION]


@pytest.mark.parametrize(
    ("keys", "val_fraction"), [([0.61, 0.9], 0.01), ([0.0001, 0.0002], 0.4), ([0.4995, 0.7], 0.4)]
)
def test_no_share_is_named_where_none_is_allowed(
    tmp_path: Path, keys: list[float], val_fraction: float
) -> None:
    with pytest.raises(ConfigError, match=r": use more documents$"):
        codes_of(tmp_path, keys, val_fraction)


def test_equal_texts_far_apart_are_found_in_little_memory(tmp_path: Path) -> None:
    """More documents than are in memory at once."""
    count = 400_000
    rows = np.zeros(count, ROW)
    numbers = np.arange(count, dtype="<u8")
    numbers[-1] = numbers[0]
    rows["digest"] = np.stack([numbers, numbers], axis=1).reshape(-1).view("V16")
    rows["key"] = numbers << np.uint64(44)
    rows["tokens"] = 10
    rows.tofile(tmp_path / "table")
    del rows
    tracemalloc.start()
    codes, left_out = select(
        tmp_path / "table", count, min_tokens=2, max_tokens=None, val_fraction=0.1
    )
    assert tracemalloc.get_traced_memory()[1] < 15 * 10**6
    tracemalloc.stop()
    assert left_out["duplicates"] == 1
    assert np.flatnonzero(codes == LEFT_OUT).tolist() == [count - 1]
