"""LensNet learns from variants of tokens alone which match of words is worth a block, without a
backbone.

In each sequence the end of the tail has stood in one block before (a *repeat*), and another block
holds the same words in another order (a *decoy*). A row's score is 1 without the repeat's block, 0
with it, plus noise. Embeddings and gists are zero, so only lexical matches tell blocks apart.
"""

from functools import partial

import torch
from torch import Tensor

from mc_ds.geometry import lod1_cover
from mc_ds.model.lensnet import LensNet
from tests.support.factories import mc_config
from tests.support.preferences import learn_to_open

MC = mc_config(
    seq_len=512,
    block_size=16,
    max_lod=1,
    recent_tokens=64,
    horizon_tokens=16,
    train_wc_length=512 - 15 * 22,
    num_random_variants=10,
    random_blocks=4,
    lens_matches="words",
    lens_index=False,
    lens_ask="none",
    lens_layers=1,
    lens_lr=3e-3,
)
DIM, VOCAB, REPEATED, NOISE = 8, 2000, 6, 0.3
STEPS, BATCH, FRESH = 120, 8, 64
GEOMETRY = MC.geometry
DISTANT = 20
"""Blocks among which repeats and decoys are planted; all lie before the latest tokens."""


def histories(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens [count, T + 1], and the block of each repeat."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (count, MC.seq_len + 1), generator=generator)
    blocks = torch.rand(count, DISTANT, generator=generator).argsort(dim=1)[:, :2]
    end = MC.seq_len - MC.horizon_tokens
    said = tokens[:, end - REPEATED : end]
    for row, (repeat, decoy) in enumerate(blocks.tolist()):
        place = repeat * MC.block_size + 4
        tokens[row, place : place + REPEATED] = said[row]
        place = decoy * MC.block_size + 4
        order = torch.randperm(REPEATED, generator=generator)
        tokens[row, place : place + REPEATED] = said[row, order]
    return tokens, blocks


def block_scores(lens: LensNet, tokens: Tensor) -> Tensor:
    """LensNet's scores of the LOD1 cover, [B, n_1 + tail]."""
    lods, starts = (x.expand(len(tokens), -1) for x in lod1_cover(GEOMETRY))
    visible = torch.zeros(len(tokens), lods.size(1) - MC.horizon_tokens, DIM)
    lod0 = torch.zeros(len(tokens), MC.seq_len, DIM)
    scores: Tensor = lens(visible, lods, starts, lod0, tokens)
    return scores


def trained() -> LensNet:
    torch.manual_seed(0)
    lens = LensNet(MC, dim=DIM)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        tokens, blocks = histories(step, BATCH)
        return tokens, blocks[:, 0]

    learn_to_open(lens, draw, partial(block_scores, lens), steps=STEPS, noise=NOISE)
    return lens


def test_lensnet_opens_what_was_said_in_this_order_before() -> None:
    lens = trained()
    tokens, blocks = histories(10_000, FRESH)
    with torch.no_grad():
        best = block_scores(lens, tokens)[:, :DISTANT].argmax(dim=1)
        other = tokens.clone()
        tail = slice(MC.seq_len - MC.recent_tokens, MC.seq_len - MC.horizon_tokens)
        other[:, tail] = tokens.roll(1, dims=0)[:, tail]
        blind = block_scores(lens, other)[:, :DISTANT].argmax(dim=1)
    found = (best == blocks[:, 0]).double().mean()
    decoys = (best == blocks[:, 1]).double().mean()
    assert found > 0.9, f"repeats {found:.2f}, decoys {decoys:.2f}"
    assert (blind == blocks[:, 0]).double().mean() < 0.3, "with another tail it cannot know"
