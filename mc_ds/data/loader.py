"""`MicroBatchDataset`: makes micro-batches with the plans of their working contexts.

Legend: B sequences, T tokens, N variants, G = N + 1 rows per sequence, R = B*G rows, W entries.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mc_ds.config import MCConfig
from mc_ds.data.batch import Batch, MicroStep, SampleSource
from mc_ds.variants import TrainingWCVariationAllocator


class MicroBatchDataset(Dataset[Batch]):
    """This rank's micro-batches: `dataset[micro_step]` depends only on `micro_step`, source and
    seed.

    Sequence b of micro-step m on rank r has the global sample index step * global_batch + (m *
    world_size + r) * micro_batch_size + b. The sequences of a step, and their variants, therefore
    do not depend on the number of ranks or micro-steps.
    """

    def __init__(
        self,
        source: SampleSource,
        mc: MCConfig,
        *,
        seed: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
    ) -> None:
        self._source = source
        self._mc = mc
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._global_batch = micro_batch_size * world_size * accumulation_steps
        self._allocators: dict[int, TrainingWCVariationAllocator] = {}

    def __getitem__(self, micro_step: MicroStep) -> Batch:
        """Make the micro-batch of a micro-step: B sequences and the plans of their R rows."""
        ids = self.sample_ids(micro_step)
        samples = [self._source.sample(index, micro_step.stage) for index in ids]
        lods, starts = self._plans(ids, micro_step.wc_length)
        return Batch(
            tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
            lods=torch.from_numpy(lods),
            starts=torch.from_numpy(starts),
            horizon_mask=torch.from_numpy(np.stack([sample.horizon_mask for sample in samples])),
            sample_ids=torch.tensor(ids),
            micro_step=micro_step,
        )

    def sample_ids(self, micro_step: MicroStep) -> list[int]:
        """Return the global sample indices of this rank's B sequences in a micro-step."""
        first = (
            micro_step.step * self._global_batch
            + (micro_step.micro * self._world_size + self._rank) * self._micro_batch_size
        )
        return list(range(first, first + self._micro_batch_size))

    def _plans(self, ids: list[int], wc_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `lods` and `starts`, each [R, W].

        If W = T there is one row per sequence, with every token uncompressed.
        """
        mc = self._mc
        if mc.rows_at(wc_length) == 1:
            rows = (len(ids), mc.seq_len)
            return np.zeros(rows, np.int64), np.tile(
                np.arange(mc.seq_len, dtype=np.int64), (len(ids), 1)
            )
        allocator = self._allocator(wc_length)
        base_lods, base_starts = allocator.baseline()
        lods, starts = [], []
        for index in ids:
            variant_lods, variant_starts = allocator.sample(
                num_variants=mc.num_random_variants, seed=(self._seed, index)
            )
            lods += [base_lods[None], variant_lods]
            starts += [base_starts[None], variant_starts]
        return np.concatenate(lods), np.concatenate(starts)

    def _allocator(self, wc_length: int) -> TrainingWCVariationAllocator:
        if wc_length not in self._allocators:
            self._allocators[wc_length] = TrainingWCVariationAllocator.of(self._mc, wc_length)
        return self._allocators[wc_length]
