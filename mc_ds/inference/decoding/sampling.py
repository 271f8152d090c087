"""Choose the next token from logits, greedily or by sampling with temperature, top-k and top-p.

A draw depends only on the seeds and on the token's position in its history. So a session's output
depends neither on the other sessions of a batch nor on how a generation is divided into calls.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError for invalid values."""

    temperature: float = 0.0
    """Divides the logits; 0 chooses the token of highest probability."""
    top_k: int | None = None
    """Keep the k most likely tokens; None: all."""
    top_p: float | None = None
    """Of these, keep the most likely tokens whose probabilities add up to at least this; None:
    all.
    """
    seed: int = 0
    """Seed of the draws, combined with the session's seed and the token's position."""

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature = {self.temperature!r}: use 0 (greedy) or a positive number"
            )
        top_k, top_p = self.top_k, self.top_p
        if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
            raise ConfigError(
                f"top_k = {top_k!r} is not a number of tokens: use at least 1, or leave it out"
            )
        if top_p is not None and (not isinstance(top_p, Real) or not 0 < top_p <= 1):
            raise ConfigError(
                f"top_p = {top_p!r} is not a probability: use more than 0 and at most 1, or "
                "leave it out"
            )
        if not isinstance(self.seed, Integral) or self.seed < 0:
            raise ConfigError(f"seed = {self.seed!r} is invalid: use a whole number, 0 or more")


class Sampler:
    """Draws one token for every row at a time."""

    def __init__(
        self, sampling: Sampling, *, seeds: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        """`seeds` has one seed per row; they are combined with the seed of `sampling`."""
        self._sampling, self._seeds = sampling, [(sampling.seed, *seed) for seed in seeds]
        self._generator = torch.Generator(device)

    def draw(self, logits_RV: Tensor, places: Sequence[int]) -> Tensor:
        """Return token ids [R] on the device of the logits; -1 for rows whose largest logit is not
        finite. `places` are the positions of the new tokens in their histories.
        """
        largest_R = logits_RV.amax(dim=-1)  # NaN if any logit is NaN
        ids_R = logits_RV.argmax(dim=-1)
        if self._sampling.temperature:
            probabilities = kept_probabilities(logits_RV, self._sampling)
            # Draw exponential variables and divide each by its p_v: the smallest quotient (here,
            # the largest inverse) belongs to token v with probability p_v.
            exponentials = torch.stack(
                [
                    row.new_empty(row.shape).exponential_(generator=self._at(seed, place))
                    for seed, place, row in zip(self._seeds, places, logits_RV, strict=True)
                ]
            )
            exponentials = exponentials.clamp_min(torch.finfo(exponentials.dtype).tiny)
            ids_R = (probabilities / exponentials).argmax(dim=-1)
        return ids_R.masked_fill(~largest_R.isfinite(), -1)

    def _at(self, seed: tuple[int, ...], place: int) -> torch.Generator:
        """Return the generator seeded for one draw."""
        mixed = np.random.SeedSequence([*seed, place]).generate_state(1, np.uint64)
        return self._generator.manual_seed(int(mixed[0]))


def kept_probabilities(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [R, V] after temperature, top-k and top-p, in this order; 0 for tokens
    that are not kept, without renormalising. Among equally likely tokens the first are kept.
    """
    # Shift the largest logit to 0: dividing by a tiny temperature then cannot overflow.
    scaled = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.size(-1):
        # Keep the logits above the k-th largest, and as many equal to it as fit.
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        more, equal = scaled > least, scaled == least
        room = sampling.top_k - more.sum(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(~(more | equal & (equal.cumsum(dim=-1) <= room)), -torch.inf)
    probabilities = scaled.softmax(dim=-1).to(logits_RV.dtype)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        dropped = mass_before >= sampling.top_p
        dropped[:, 0] = False  # always keep the most likely token
        ordered = ordered.masked_fill(dropped, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities
