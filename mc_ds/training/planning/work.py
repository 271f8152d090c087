"""Counts the floating-point operations of a training step, by network.

Forward and backward together take, per entry, 6 operations for each parameter (including the
embedding's), and for attention 6 L W D with a causal mask (half of the W^2 pairs) or 12 L W D
without. In GistNet, the blocks process children and the head processes gists. Recomputation does
not count; frozen networks count as if trained.

Legend: G rows per sequence, W entries, T tokens, L layers, D width, N
nodes of a tree by level.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mc_ds.config import RunConfig
from mc_ds.model.build import build_networks


@dataclass(frozen=True)
class Work:
    """Operations by network, of a sequence, a micro-step or a step."""

    backbone: float
    gistnet: float
    lensnet: float

    @property
    def model(self) -> float:
        """Operations of backbone and GistNet; only these count for MFU."""
        return self.backbone + self.gistnet

    def __mul__(self, times: int) -> "Work":
        """Return `times` as many operations."""
        return Work(times * self.backbone, times * self.gistnet, times * self.lensnet)


def work_per_micro_step(config: RunConfig, wc_length: int) -> Work:
    """Return the operations of `train.micro_batch_size` sequences at W = `wc_length`."""
    return work_per_sequence(config, wc_length) * config.train.micro_batch_size


def work_per_sequence(config: RunConfig, wc_length: int) -> Work:
    """Return the operations of one sequence, with all its rows, at W = `wc_length`.

    Builds the networks on the meta device, which takes no memory.
    """
    mc, backbone = config.mc, config.backbone
    model, lensnet = build_networks(config, vocab_size=config.data.vocab_size, device="meta")
    rows, nodes = mc.rows_at(wc_length), mc.geometry.node_counts
    attention = 6.0 * backbone.num_layers * wc_length * backbone.dim
    read = rows * wc_length * (6.0 * _count(model.backbone) + attention)
    gists = scores = 0.0
    if model.gistnet is not None:
        head = _count(model.gistnet.head_up) + _count(model.gistnet.head_down)
        blocks = _count(model.gistnet) - head
        gists = 6.0 * (sum(nodes[:-1]) * blocks + sum(nodes[1:]) * head)
    if lensnet is not None:
        visible = wc_length - mc.horizon_tokens
        unmasked = 12.0 * mc.lens_layers * visible * mc.lens_dim
        scores = rows * visible * (6.0 * _count(lensnet) + unmasked)
    return Work(read, gists, scores)


def shares(work: Work) -> Mapping[str, float]:
    """Return each network's share of all operations."""
    total = work.model + work.lensnet
    return {
        "backbone": work.backbone / total,
        "GistNet": work.gistnet / total,
        "LensNet": work.lensnet / total,
    }


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """Return parameters per module, counted on the meta device. A tied head counts only as
    embedding.
    """
    model, lensnet = build_networks(config, vocab_size=config.data.vocab_size, device="meta")
    backbone = model.backbone
    counts = {
        "embedding": _count(backbone.embedding),
        "decoder blocks": _count(backbone.blocks) + _count(backbone.norm),
    }
    if not config.backbone.tie_embeddings:
        counts["head"] = _count(backbone.head)
    if model.gistnet is not None and lensnet is not None:
        counts |= {"gistnet": _count(model.gistnet), "lensnet": _count(lensnet)}
    return counts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
