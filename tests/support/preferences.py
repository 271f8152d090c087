"""Random plans, scores and losses of variants for the tests of the preference loss."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.preference import PreferenceResult, preference_loss
from mc_ds.preference.objective import (
    Rows,
)
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.reference_preference import (
    as_tensors,
    baseline_row,
    preference,
    random_rows,
)


def small_config(**options: Any) -> MCConfig:
    """Two levels at K = 3: 36 tokens in 22 entries, a head of 30."""
    shape = dict(
        seq_len=36,
        block_size=3,
        max_lod=2,
        train_wc_length=22,
        recent_tokens=6,
        horizon_tokens=3,
        num_random_variants=3,
    )
    return MCConfig(**{**shape, **options})


class Batch:
    """Random plans and scores, as Python rows for the reference and as tensors."""

    def __init__(self, config: MCConfig, sequences: int, seed: int) -> None:
        rng = random.Random(seed)
        self.config, self.rows_per_sequence = config, config.rows_per_sequence
        self.sequences = [
            [baseline_row(config), *random_rows(rng, config, config.num_random_variants)]
            for _ in range(sequences)
        ]
        self.lods, self.starts = as_tensors([row for rows in self.sequences for row in rows])
        generator = torch.Generator().manual_seed(seed)
        self.scores = torch.rand(self.lods.shape, generator=generator, dtype=torch.float64) * 2 - 1
        self.row_scores = 2.5 + 0.3 * torch.randn(len(self.lods), generator=generator)

    def loss(self, scores: Tensor | None = None, **options: Any) -> PreferenceResult:
        arguments = (
            dict(
                row_scores=self.row_scores,
                rows_per_sequence=self.rows_per_sequence,
                config=self.config,
            )
            | options
        )
        return preference_loss(
            self.scores if scores is None else scores, self.lods, self.starts, **arguments
        )

    def reference(self, scores: Tensor, std: float | None = None) -> Any:
        by_sequence = self.row_scores.double().unflatten(0, (-1, self.rows_per_sequence)).tolist()
        return preference(
            self.sequences,
            scores.unflatten(0, (-1, self.rows_per_sequence)),
            by_sequence,
            self.config,
            std,
        )


def planted_batch(
    config: MCConfig, sequences: int, noise: float, seed: int = 0
) -> tuple[Batch, Tensor]:
    """Row scores fall with the summed value of the blocks that lie open, plus noise (in units of
    their spread); scores know the values.
    """
    batch = Batch(config, sequences, seed)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(
        sequences, config.seq_len // config.block_size + 1, generator=generator, dtype=torch.float64
    )
    values = values.repeat_interleave(config.rows_per_sequence, 0)
    scores = values.gather(1, batch.starts // config.block_size)
    open_here = (batch.lods == 0) & (batch.starts < config.geometry.head_len)
    signal = -(scores * open_here).sum(1) / config.block_size
    signal = signal / signal.unflatten(0, (sequences, -1))[:, 1:].std(1).square().mean().sqrt()
    batch.row_scores = signal + noise * torch.randn(
        signal.shape, generator=generator, dtype=torch.float64
    )
    return batch, 0.3 * scores


def allocator_batch(
    max_lod: int, sequences: int, shared: bool = True, worth: float = 0.0
) -> tuple[Rows, Tensor, MCConfig]:
    """Plans of the training allocator and row scores that know where detail lies; `worth` is the
    mean worth of an open token.

    LOD histograms are equal within a sequence; unless `shared`, each variant is drawn as if of a
    sequence of its own.
    """
    length, variants = (148, 4) if max_lod == 1 else (211, 4)
    seq_len = 256 if max_lod == 1 else 512
    config = small_config(
        seq_len=seq_len,
        block_size=8 if max_lod == 2 else 4,
        max_lod=max_lod,
        train_wc_length=length,
        num_random_variants=variants,
    )
    allocator = TrainingWCVariationAllocator(
        config.geometry,
        length,
        lod2_probability=0.5,
    )
    drawn = variants if shared else 1
    plans = [
        allocator.sample(drawn, (3, index)) for index in range(sequences * (variants // drawn))
    ]
    lods, starts = (
        torch.from_numpy(np.concatenate(part)).unflatten(0, (sequences, variants))
        for part in zip(*plans, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sequences, 1, seq_len, generator=generator).expand(-1, variants, -1)
    row_scores = ((values.gather(2, starts) - worth) * (lods == 0)).mean(2)
    return Rows(torch.zeros(lods.shape), lods, starts), row_scores, config
