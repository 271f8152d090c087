"""The real LensNet, preference loss and allocator learn a planted signal in seconds, without a
backbone.

Each sequence hides eight facts in its head and asks for two of them in the visible tail, by the
same random embeddings. A row's score is the share of the *asked* facts that it does not hold at
LOD0, plus Gaussian noise with half the standard deviation of that signal over the variants.
Gists are means of their children. A scorer that knew the signal would reach a correlation of
about -0.85; one that knows only where facts are, or only LODs, must fail.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mc_ds.geometry import lod_map, node_index, start_counts
from mc_ds.model.gather import gather_entries
from mc_ds.model.lensnet import LensNet, sum_children
from mc_ds.preference import GainMoments, PreferenceResult, preference_loss
from mc_ds.training.lens import CLIP_NORM, WEIGHT_DECAY
from tests.support.factories import mc_config, plan

MC = mc_config(
    seq_len=64,
    train_wc_length=34,
    horizon_tokens=6,
    num_random_variants=5,
    lens_dim=64,
    lens_layers=1,
    lens_lr=3e-3,
)
FACTS, ASKED, NOISE = 8, 2, 0.5
VOCAB, DIM = 128, 64
STEPS, WARMUP, BATCH, FRESH = 200, 40, 16, 64


class Planted(NamedTuple):
    entries: Tensor
    lods: Tensor
    starts: Tensor
    lod0: Tensor
    row_scores: Tensor
    asked: Tensor
    """Positions of the asked facts, [B, ASKED]."""


def node_table(lod0: Tensor) -> Tensor:
    levels = [lod0]
    for _ in range(MC.max_lod):
        levels.append(sum_children(levels[-1], MC.block_size) / MC.block_size)
    return torch.cat(levels, dim=1)


def planted(
    first: int, sequences: int, embeddings: Tensor, *, other_question: bool = False
) -> Planted:
    """Sequences number first, first + 1, ...; with `other_question` LensNet is asked for facts
    that do not count.
    """
    rng = np.random.default_rng((0, first))
    tokens = rng.integers(0, VOCAB // 2, (sequences, MC.seq_len))
    keys = np.stack([VOCAB // 2 + rng.permutation(VOCAB // 2)[:FACTS] for _ in range(sequences)])
    blocks = MC.geometry.head_len // MC.block_size
    places = np.stack([rng.permutation(blocks)[:FACTS] for _ in range(sequences)]) * MC.block_size
    places += rng.integers(0, MC.block_size, places.shape)
    np.put_along_axis(tokens, places, keys, axis=1)
    question = slice(MC.seq_len - MC.horizon_tokens - ASKED, MC.seq_len - MC.horizon_tokens)
    tokens[:, question] = keys[:, ASKED : 2 * ASKED] if other_question else keys[:, :ASKED]

    lods, starts = plan(MC, sequences, first)
    lod0 = embeddings[torch.from_numpy(tokens)]
    entries = gather_entries(node_table(lod0), node_index(lods, starts, MC.geometry))[
        :, : MC.train_wc_length - MC.horizon_tokens
    ]
    token_lods = lod_map(lods, start_counts(starts, MC.seq_len)).unflatten(
        0, (sequences, MC.rows_per_sequence)
    )
    asked = torch.from_numpy(places[:, :ASKED])
    closed = (
        (token_lods.gather(2, asked[:, None].expand(-1, MC.rows_per_sequence, -1)) != 0)
        .float()
        .mean(-1)
    )
    noise = torch.from_numpy(rng.standard_normal(closed.shape)).float()
    row_scores = closed + NOISE * closed[:, 1:].std(correction=0) * noise
    return Planted(entries, lods, starts, lod0, row_scores.flatten(), asked)


def advantage_of_asked_gists(lens: LensNet, batch: Planted) -> float:
    """Mean score of the gists of the variants that hold an asked fact, minus that of all others."""
    scores = lens(batch.entries, batch.lods, batch.starts, batch.lod0)
    first, span = batch.starts[..., None], (MC.block_size**batch.lods)[..., None]
    asked = batch.asked.repeat_interleave(MC.rows_per_sequence, dim=0)[:, None]
    holds = ((first <= asked) & (asked < first + span)).any(-1)
    gist = batch.lods > 0
    return float(scores[gist & holds].mean() - scores[gist & ~holds].mean())


def preference(lens: LensNet, batch: Planted, state: GainMoments | None = None) -> PreferenceResult:
    scores = lens(batch.entries, batch.lods, batch.starts, batch.lod0)
    return preference_loss(
        scores,
        batch.lods,
        batch.starts,
        batch.row_scores,
        rows_per_sequence=MC.rows_per_sequence,
        config=MC,
        state=state,
    )


def train(embeddings: Tensor) -> LensNet:
    lens, gain_moments = LensNet(MC, dim=DIM), GainMoments(MC.lens_adv_norm_beta)
    optimizer = torch.optim.AdamW(
        lens.parameters(), lr=MC.lens_lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP, (STEPS - step) / (0.3 * STEPS))
    )
    for step in range(STEPS):
        result = preference(lens, planted(step * BATCH, BATCH, embeddings), gain_moments)
        optimizer.zero_grad()
        result.loss.backward()
        nn.utils.clip_grad_norm_(lens.parameters(), CLIP_NORM)
        optimizer.step()
        decay.step()
        gain_moments.update(*result.gain_moments)
    return lens


def test_lensnet_learns_which_content_is_worth_its_place() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(VOCAB, DIM)
    lens = train(embeddings)
    fresh = STEPS * BATCH
    with torch.no_grad():
        learned = preference(lens, planted(fresh, FRESH, embeddings)).metrics
        advantage = advantage_of_asked_gists(lens, planted(fresh, FRESH, embeddings))
        other = preference(lens, planted(fresh, FRESH, embeddings, other_question=True)).metrics
    assert learned["mc/preference_corr_mean"] <= -0.5
    assert learned["mc/preference_corr_lod_only"] > -0.1
    assert learned["mc/preference_agreement"] > 0.6
    assert advantage > 0.3, "higher means more detail here"
    assert other["mc/preference_corr_mean"] > -0.1, "asked for other facts, it would open those"
