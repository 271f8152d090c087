"""What `--dry_run` estimates: the largest shapes of a run, its memory per rank, and the report's
text.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.config import MCConfig, RunConfig
from mc_ds.config.cli import load_config
from mc_ds.training.planning.estimate import (
    BUCKET,
    activation_values,
    dry_run_report,
    largest_shapes,
    memory_per_rank,
)
from tests.support.factories import mc_config, run_config
from tests.support.processes import ROOT

COUNTS = {"decoder blocks": 1_000_000, "gistnet": 200_000, "lensnet": 100_000}


@pytest.mark.parametrize(
    ("variants", "stages", "rows", "length"),
    [
        (4, [(0, 2608), (9, 2112)], 5, 2608),  # both compressed: the longer one
        (4, [(0, 4096), (9, 2112)], 5, 2112),  # five rows of 2112 entries are more than one of 4096
        (2, [(0, 4096), (9, 1306)], 1, 4096),  # three rows of 1306 are fewer
        (2, [(0, 4096), (5, 1399), (9, 1306)], 3, 1399),  # three rows of 1399 are more
    ],
)
def test_shapes_are_those_of_the_stage_with_most_entries(variants, stages, rows, length):
    schedule = [dict(start_step=start, train_wc_length=length) for start, length in stages]
    options = [
        f"--mc.wc_schedule={json.dumps(schedule)}",
        f"--mc.train_wc_length={stages[-1][1]}",
        f"--mc.num_random_variants={variants}",
    ]
    config = load_config([*options, "--train.micro_batch_size=2"])
    assert largest_shapes(config) == {"B": 2, "G": rows, "R": 2 * rows, "W": length}


def test_the_plain_baseline_reads_the_whole_sequence():
    assert largest_shapes(load_config(["--mc.num_random_variants=0"])) == {
        "B": 1,
        "G": 1,
        "R": 1,
        "W": 4096,
    }


def test_memory_by_stage():
    of = {
        stage: memory_per_rank(RunConfig(), COUNTS, 4, stage, precision="bf16")
        for stage in (1, 2, 3)
    }
    engine = 1_200_000
    assert [of[s]["optimizer"] for s in of] == [engine * 12 / 4] * 3
    assert [of[s]["gradients"] for s in of] == [engine * 4, engine, engine]
    assert [of[s]["weights"] for s in of] == [engine * 2, engine * 2, engine * 2 / 4]
    assert {of[s]["LensNet"] for s in of} == {1_600_000}
    assert [of[s]["bucket"] for s in of] == [0, 0, engine * 4]
    large = {"backbone": 10**9}
    for ranks, bucket in ((1, 0), (2, BUCKET * 4)):
        assert memory_per_rank(RunConfig(), large, ranks, 3, precision="bf16")["bucket"] == bucket
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())["zero_optimization"]
    assert zero3["reduce_bucket_size"] == BUCKET
    for frozen, learning in (("backbone", 200_000), ("all", 0)):
        kept = memory_per_rank(
            load_config([f"--train.frozen={frozen}", "--train.init_from=x"]),
            COUNTS,
            4,
            2,
            precision="bf16",
        )
        assert (kept["weights"], kept["gradients"], kept["optimizer"]) == (
            engine * 2,
            learning * 4 / 4,
            learning * 12 / 4,
        )
    assert kept["activations"] < of[3]["activations"]


RECOMPUTED = mc_config(gist_layers=4)
SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]


def values_kept(share: float, mc: MCConfig = RECOMPUTED, **train: Any) -> int:
    """Of a decoder with eight blocks and a GistNet with four."""
    shape = dict(num_layers=8, dim=32, ffn_dim=64, num_heads=4, num_kv_heads=2)
    return activation_values(run_config(mc, shape, activation_checkpointing=share, **train))


def test_a_recomputed_block_keeps_its_input_and_one_block_is_in_memory_at_a_time() -> None:
    """Values of a block of the decoder and of GistNet; its input is one of them."""
    block, gist_block = 8 * 32 + 2 * 16 + 4 * 64, 10 * 32 + 4 * 4 * 32
    entries, children = 4 * 48, 96 + 24
    none = values_kept(0.0)
    for share, kept, gists_kept in ((0.25, 6, 3), (0.5, 4, 2), (0.75, 2, 1), (1.0, 1, 1)):
        saved = entries * (8 - kept) * (block - 32) + children * (4 - gists_kept) * (
            gist_block - 32
        )
        assert none - values_kept(share) == saved
    plain = mc_config(num_random_variants=0)
    nodes = 96 + 24 + 6
    assert values_kept(0.0, plain) == 96 * 8 * block + (nodes + 96) * 32
    assert values_kept(1.0, plain) == 96 * (block + 7 * 32) + (nodes + 96) * 32


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_recomputation_never_needs_more_memory(one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert values_kept(less) >= values_kept(more)


def test_without_a_backward_pass_nothing_is_recomputed() -> None:
    frozen = {values_kept(share, frozen="all", init_from="x") for share in SHARES}
    assert len(frozen) == 1


def test_the_switch_recomputes_all_blocks() -> None:
    for options, share in ((["--train.activation_checkpointing"], 1.0), ([], 0.0)):
        found, expected = (
            memory_per_rank(config, COUNTS, 4, 3, precision="bf16")
            for config in (
                load_config(options),
                load_config([f"--train.activation_checkpointing={share}"]),
            )
        )
        assert found == expected


def test_the_report_holds_what_a_dry_run_is_for():
    config = load_config(["--train.micro_batch_size=2"])
    text = dry_run_report(config, COUNTS, world_size=2, stage=3)
    for part in (
        "train_wc_length: 2112",
        "1,300,000",
        (
            "B = 2 sequences per rank and micro-step, G = 5 rows per sequence, R = 10 rows, W ="
            " 2112 entries"
        ),
        "entries per sequence: 10,560 (G*W) for 4,096 tokens",
        "micro-steps per step: 2",
        "tokens per step: 32,768 (84,480 entries)",
        "ZeRO-3 *",
    ):
        assert part in text
