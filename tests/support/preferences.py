"""Random plans, scores and losses of variants for the tests of the preference loss."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.model.lensnet import LensNet
from mc_ds.preference import GainMoments, PreferenceResult, preference_loss
from mc_ds.preference.objective import Rows
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.factories import plan
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


def learn_to_open(
    lens: LensNet,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    scores_of: Callable[[Tensor], Tensor],
    *,
    steps: int,
    noise: float,
) -> None:
    """Train LensNet with simulated losses of variants with random blocks: a row's is 0 if it opens
    its sequence's planted block and 1 otherwise, plus normal noise.

    `draw` gives a step's tokens [B, T + 1] and planted blocks [B], `scores_of` LensNet's scores of
    the LOD1 cover.
    """
    config, gains = lens.config, GainMoments(lens.config.lens_adv_norm_beta)
    optimizer = torch.optim.AdamW(lens.parameters(), lr=config.lens_lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        tokens, blocks = draw(step)
        lods, starts = plan(config, len(tokens), first=step * len(tokens))
        planted = blocks[:, None].repeat_interleave(config.rows_per_sequence, dim=0)
        missing = 1 - (starts == planted * config.block_size).any(1).float()
        result = preference_loss(
            scores_of(tokens),
            lods,
            starts,
            missing + noise * torch.randn(len(lods), generator=generator),
            rows_per_sequence=config.rows_per_sequence,
            config=config,
            state=gains,
        )
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(lens.parameters(), 1.0)
        optimizer.step()
        gains.update(*result.gain_moments)
