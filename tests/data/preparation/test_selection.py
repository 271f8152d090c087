"""Which split is empty, and what would fill it."""

import re
from pathlib import Path

import numpy as np
import pytest

from mc_ds.config import ConfigError
from mc_ds.data.preparation.selection import TRAIN, VALIDATION, select
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
