"""LensNet learns from variants of tokens alone to open the block with words that are similar to
those at the end of the tail, though no token occurs in both.

Every token has a *synonym*, whose embedding is similar. In each sequence one block holds synonyms
of the last words, at random places. A row's score is 1 without this block, 0 with it, plus noise.
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
    lens_matches="meaning",
    lens_dim=32,
    lens_heads=2,
    lens_ask="none",
    lens_layers=1,
    lens_lr=3e-3,
)
DIM, WORDS, ASKED, NOISE = 32, 1000, 3, 0.3
STEPS, BATCH, FRESH = 100, 8, 256
DISTANT = 20
"""Blocks among which synonyms are planted; all lie before the latest tokens."""
END = MC.seq_len - MC.horizon_tokens


def embeddings() -> Tensor:
    """Word w and its synonym w + WORDS have a cosine of 0.8; [2 WORDS, D]."""
    words, others = torch.randn(2, WORDS, DIM, generator=torch.Generator().manual_seed(0)).unbind()
    return torch.cat([words, 0.8 * words + 0.6 * others])


def histories(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens [count, T + 1], and the block with synonyms of the last visible words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2 * WORDS, (count, MC.seq_len + 1), generator=generator)
    blocks = torch.randint(DISTANT, (count,), generator=generator)
    for row, block in enumerate(blocks.tolist()):
        places = block * MC.block_size + torch.randperm(MC.block_size, generator=generator)
        asked = tokens[row, END - ASKED : END]
        tokens[row, places[:ASKED]] = (asked + WORDS) % (2 * WORDS)
    return tokens, blocks


def block_scores(lens: LensNet, tokens: Tensor, table: Tensor) -> Tensor:
    """LensNet's scores of the LOD1 cover, [B, n_1 + tail]; its entries say nothing."""
    lods, starts = (x.expand(len(tokens), -1) for x in lod1_cover(MC.geometry))
    visible = torch.zeros(len(tokens), lods.size(1) - MC.horizon_tokens, DIM)
    scores: Tensor = lens(visible, lods, starts, table[tokens[:, : MC.seq_len]], tokens)
    return scores


def trained(table: Tensor) -> LensNet:
    torch.manual_seed(0)
    lens = LensNet(MC, dim=DIM)
    learn_to_open(
        lens,
        partial(histories, count=BATCH),
        partial(block_scores, lens, table=table),
        steps=STEPS,
        noise=NOISE,
    )
    return lens


def test_lensnet_opens_the_block_of_similar_words() -> None:
    table = embeddings()
    lens = trained(table)
    tokens, blocks = histories(10_000, FRESH)
    assert lens.meaning is not None
    with torch.no_grad():
        best = block_scores(lens, tokens, table)[:, :DISTANT].argmax(dim=1)
        unlike = table.clone()
        unlike[WORDS:] = torch.randn(WORDS, DIM, generator=torch.Generator().manual_seed(5))
        blind = block_scores(lens, tokens, unlike)[:, :DISTANT].argmax(dim=1)
    found = (best == blocks).double().mean()
    assert found > 0.7, f"{found:.2f}"
    assert (blind == blocks).double().mean() < 0.3, "without similarity it cannot know"
