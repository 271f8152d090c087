"""Choosing the next token from logits: greedy, or sampled with a temperature among the likeliest.

Every row draws from its own generator, so that what a session says does not depend on the sessions
beside it.

Legend: R rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError for values that cannot work."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Of the kept ones, keep the likeliest that together have at least this probability."""
    seed: int = 0
    """Of the row's generator."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature = {self.temperature} cannot be sampled with: use 0 (greedy) or a "
                f"positive number"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"top_k = {self.top_k} keeps no token: use at least 1, or leave it out"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p = {self.top_p} is no probability mass: use more than 0 and at most 1, or "
                f"leave it out"
            )


class Sampler:
    """Draws the tokens of one row after another with one `Sampling`."""

    def __init__(self, sampling: Sampling, *, rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self._generators = [
            torch.Generator(device).manual_seed(sampling.seed)
            for _ in range(rows if sampling.temperature else 0)
        ]

    def draw(self, logits_RV: Tensor) -> Tensor:
        """Token ids [R] of float32 logits, on their device."""
        if not self.sampling.temperature:
            return logits_RV.argmax(dim=-1)
        probabilities = kept_probabilities(logits_RV, self.sampling)
        # The smallest of exponential times with these rates is at each token with its probability.
        times = torch.stack(
            [
                row.new_empty(row.shape).exponential_(generator=g)
                for row, g in zip(logits_RV, self._generators, strict=True)
            ]
        )
        return (probabilities / times.clamp_min(torch.finfo(times.dtype).tiny)).argmax(dim=-1)


def kept_probabilities(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [R, V] after temperature, top-k and top-p, in this order; zero for tokens that
    are not kept (not renormalised).
    """
    scaled = logits_RV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.size(-1):
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        likelier = (
            ordered.cumsum(dim=-1) - ordered
        )  # mass of the tokens before each: the likeliest is always kept
        ordered = ordered.masked_fill(likelier >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities
