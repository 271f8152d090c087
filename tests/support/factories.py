"""Small configurations, plans and models for the tests, and hypothesis strategies over
working-context geometries.
"""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mc_ds.config import BackboneConfig, MCConfig, RunConfig
from mc_ds.geometry import Geometry
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.variants import TrainingWCVariationAllocator

VOCAB = 61


def mc_config(**changes: Any) -> MCConfig:
    """T = 96, K = 4, two levels: 21 head blocks and 5 whole spans; W = 48 takes 16 units, so
    that all levels mix.
    """
    base = dict(
        seq_len=96,
        block_size=4,
        max_lod=2,
        train_wc_length=48,
        recent_tokens=12,
        horizon_tokens=5,
        num_random_variants=3,
        training_lod2_probability=0.5,
        lens_dim=32,
        lens_layers=2,
        lens_heads=2,
    )
    return MCConfig(**{**base, **changes})


def run_config(
    mc: MCConfig | None = None, backbone: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    if mc is not None and mc.random_blocks:  # which train LensNet alone
        train = {"frozen": "all", "init_from": "elsewhere", **train}
    shape = dict(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, tie_embeddings=True)
    return RunConfig(
        mc=mc or mc_config(),
        backbone=BackboneConfig(**{**shape, **(backbone or {})}),
        train=dict(warmup_steps=1, **train),
    )


def allocator(mc: MCConfig) -> TrainingWCVariationAllocator:
    return TrainingWCVariationAllocator.of(mc, mc.train_wc_length)


def plan(mc: MCConfig, sequences: int, first: int = 2) -> tuple[Tensor, Tensor]:
    """`lods` and `starts` [R, W] of a micro-batch: per sequence the baseline and its variants.
    By default of samples with LOD2 spans.
    """
    source = allocator(mc)
    rows = [
        source.baseline(),
        *(source.sample(mc.num_random_variants, (0, first + n)) for n in range(sequences)),
    ]
    base_lods, base_starts = (x[None] for x in rows[0])
    lods = np.concatenate([np.concatenate([base_lods, lods]) for lods, _ in rows[1:]])
    starts = np.concatenate([np.concatenate([base_starts, starts]) for _, starts in rows[1:]])
    return torch.from_numpy(lods), torch.from_numpy(starts)


def model(config: RunConfig, seed: int = 0) -> MegaContextModel:
    """A root module whose zero-initialised parts are random too, so that every path carries
    signal.
    """
    torch.manual_seed(seed)
    return wake(MegaContextModel(config, vocab_size=VOCAB))


def wake(module: nn.Module, std: float = 0.2) -> Any:
    """Draws the parameters that are zero at initialisation: what they gate would be invisible
    otherwise.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return module


def tokens(config: MCConfig, sequences: int, seed: int = 0) -> Tensor:
    return torch.randint(
        VOCAB, (sequences, config.seq_len + 1), generator=torch.Generator().manual_seed(seed)
    )


@st.composite
def geometries(draw: st.DrawFn, max_blocks: int = 100) -> Geometry:
    """K of 2..8, one to three levels, tails of any length, heads that are no multiple of the
    coarser spans.
    """
    block_size = draw(st.integers(2, 8))
    recent_tokens = draw(st.integers(1, 3 * block_size))
    head_len = block_size * draw(st.integers(1, max_blocks))
    stray = draw(st.integers(0, block_size - 1))
    return Geometry(
        seq_len=head_len + stray + recent_tokens,
        block_size=block_size,
        max_lod=draw(st.integers(1, 3)),
        recent_tokens=recent_tokens,
    )


@st.composite
def allocators(draw: st.DrawFn, max_blocks: int = 100) -> TrainingWCVariationAllocator:
    """Allocators of every reachable W, with any law of LOD2 spans."""
    geometry = draw(geometries(max_blocks))
    units = draw(st.integers(0, geometry.max_units))
    return TrainingWCVariationAllocator(
        geometry,
        geometry.seq_len - units * (geometry.block_size - 1),
        lod2_probability=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        lod2_max_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
