"""Micro-batches: the same sequences and variants on any ranks, workers and restarts, in order,
with bounded prefetch.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.data import (
    Batch,
    LanguageModelSource,
    MicroBatchDataset,
    MicroStep,
    Sample,
    ShardWriter,
    TokenShards,
    make_loader,
    prefetched_micro_steps,
)

MC = MCConfig(
    seq_len=64,
    block_size=4,
    max_lod=2,
    train_wc_length=40,
    recent_tokens=12,
    horizon_tokens=6,
    num_random_variants=3,
)
SEED = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelSource:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, vocab_size=5000, tokenizer_sha256="", shard_tokens=512) as writer:
        writer.append(np.arange(5000))
    return LanguageModelSource(
        TokenShards(folder), seq_len=MC.seq_len, horizon_tokens=MC.horizon_tokens, seed=SEED
    )


def dataset(
    source: LanguageModelSource,
    *,
    mc: MCConfig = MC,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
) -> MicroBatchDataset:
    return MicroBatchDataset(
        source,
        mc,
        seed=SEED,
        micro_batch_size=2,
        rank=rank,
        world_size=world,
        accumulation_steps=accumulation,
    )


def micro_steps(
    steps: range, accumulation: int = 1, wc_length: int = MC.train_wc_length
) -> list[MicroStep]:
    return [MicroStep(step, micro, wc_length, 0) for step in steps for micro in range(accumulation)]


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.tokens, batch.lods, batch.starts, batch.horizon_mask, batch.sample_ids]


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for x, y in zip(tensors(one), tensors(other), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_shapes_and_contents(source: LanguageModelSource) -> None:
    batch = dataset(source)[MicroStep(3, 0, 40, 0)]
    assert batch.tokens.shape == (2, 65)
    assert batch.lods.shape == batch.starts.shape == (2 * 4, 40)
    assert batch.horizon_mask.tolist() == [[1.0] * 6] * 2
    assert [t.dtype for t in tensors(batch)] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
    ]
    assert batch.sample_ids.tolist() == [6, 7]
    assert (batch.tokens.diff() == 1).all(), "a window of the corpus 0, 1, 2, ..."
    for first in (0, 4):
        assert batch.lods[first].eq(0).all(), "the first row of a sequence is its baseline"
        assert batch.starts[first].tolist() == list(range(24, 64))
        covered = (4 ** batch.lods[first + 1 : first + 4]).sum(-1)
        assert covered.tolist() == [64] * 3, "variants cover the whole sequence"
    assert not torch.equal(batch.starts[1:4], batch.starts[5:8]), (
        "sequences have their own variants"
    )


def test_two_ranks_make_the_samples_of_two_accumulation_steps(source: LanguageModelSource) -> None:
    one = dataset(source, accumulation=2)
    accumulated = [one[m] for m in micro_steps(range(4), accumulation=2)]
    two = [dataset(source, rank=r, world=2) for r in range(2)]
    parallel = [two[rank][m] for m in micro_steps(range(4)) for rank in range(2)]
    assert_equal(accumulated, parallel)
    ids = torch.cat([batch.sample_ids for batch in accumulated])
    assert ids.tolist() == list(range(16)), "every global sample once, in order"


def test_workers_change_nothing_and_order_is_kept(source: LanguageModelSource) -> None:
    steps = micro_steps(range(7))
    in_process = list(make_loader(dataset(source), steps, num_workers=0, pin_memory=False))
    in_workers = list(make_loader(dataset(source), steps, num_workers=2, pin_memory=False))
    assert [batch.micro_step for batch in in_workers] == steps
    assert_equal(in_process, in_workers)


def test_resuming_at_a_later_step_gives_the_same_batches(source: LanguageModelSource) -> None:
    whole = list(
        make_loader(dataset(source), micro_steps(range(8)), num_workers=0, pin_memory=False)
    )
    resumed = list(
        make_loader(dataset(source), micro_steps(range(5, 8)), num_workers=1, pin_memory=False)
    )
    assert_equal(whole[5:], resumed)


def test_loading_leaves_the_global_random_state_alone(source: LanguageModelSource) -> None:
    before = torch.random.get_rng_state()
    list(make_loader(dataset(source), micro_steps(range(2)), num_workers=0, pin_memory=False))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_endless_micro_steps_are_drawn_no_further_than_promised(
    source: LanguageModelSource, num_workers: int
) -> None:
    drawn = 0

    def endless() -> Iterator[MicroStep]:
        nonlocal drawn
        for step in itertools.count():
            drawn = step + 1
            yield MicroStep(step, 0, 40, 0)

    loader = make_loader(dataset(source), endless(), num_workers=num_workers, pin_memory=False)
    for returned in range(1, 6):
        next(loader)
        assert drawn - returned <= prefetched_micro_steps(num_workers)


def test_each_stage_of_the_curriculum_has_its_own_wc_length(source: LanguageModelSource) -> None:
    steps = [MicroStep(0, 0, 40, 0), MicroStep(1, 0, 52, 1), MicroStep(2, 0, 40, 1)]
    batches = list(make_loader(dataset(source), steps, num_workers=0, pin_memory=False))
    assert [batch.lods.shape[1] for batch in batches] == [40, 52, 40]


def test_in_full_sight_a_sequence_has_one_row_which_is_the_whole_of_it(
    source: LanguageModelSource,
) -> None:
    data = dataset(source)
    for step in (0, 3):
        compressed, full = (data[MicroStep(step, 0, wc_length, 0)] for wc_length in (40, 64))
        assert (compressed.rows_per_sequence, full.rows_per_sequence) == (4, 1)
        assert full.lods.tolist() == [[0] * 64] * 2
        assert full.starts.tolist() == [list(range(64))] * 2
        for name in ("tokens", "horizon_mask", "sample_ids"):
            assert torch.equal(getattr(full, name), getattr(compressed, name)), (
                "W says nothing about what is drawn"
            )
        assert_equal(
            [data[MicroStep(step, 0, 40, 0)]], [dataset(source)[MicroStep(step, 0, 40, 0)]]
        )  # nor does the step before
        assert [t.dtype for t in tensors(full)] == [t.dtype for t in tensors(compressed)]


def test_every_shorter_working_context_has_baseline_and_variants(
    source: LanguageModelSource,
) -> None:
    for wc_length in range(61, MC.geometry.coarsest_length - 1, -3):
        batch = dataset(source)[MicroStep(1, 0, wc_length, 0)]
        assert batch.rows_per_sequence == 4
        assert batch.lods.shape == batch.starts.shape == (2 * 4, wc_length)
        assert batch.starts[::4].tolist() == [list(range(64 - wc_length, 64))] * 2
        assert (4**batch.lods).unflatten(0, (2, 4))[:, 1:].sum(-1).eq(64).all()


def test_without_variants_a_row_is_the_whole_sequence_token_by_token(
    source: LanguageModelSource,
) -> None:
    batch = dataset(source, mc=MC.model_copy(update={"num_random_variants": 0}))[
        MicroStep(0, 0, 40, 0)
    ]
    assert batch.lods.tolist() == [[0] * 64] * 2
    assert batch.starts.tolist() == [list(range(64))] * 2


def test_a_new_kind_of_sample_is_one_class_that_knows_index_and_stage() -> None:
    class Counting:
        def sample(self, index: int, stage: int) -> Sample:
            return Sample(np.full(65, 100 * stage + index), np.arange(6, dtype=np.float32))

    data = MicroBatchDataset(
        Counting(), MC, seed=0, micro_batch_size=2, rank=1, world_size=2, accumulation_steps=1
    )
    batch = data[MicroStep(2, 0, 40, 3)]
    assert batch.tokens[:, 0].tolist() == [310, 311]
    assert batch.horizon_mask.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_batch_moves_as_a_whole_and_keeps_its_identity(source: LanguageModelSource) -> None:
    batch = dataset(source)[MicroStep(1, 0, 40, 0)]
    moved = batch.to("meta")
    assert all(t.is_meta for t in tensors(moved))
    assert moved.micro_step == batch.micro_step
