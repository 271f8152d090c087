"""Metrics that reduce exactly over micro-steps and ranks, by combining their parts instead of
averaging their values.

Each key has one reduction: a *mean* (the ratio of two sums), a *sum*, a *maximum*, a *minimum*, or
a *sample set*, whose mean, 95th percentile and standard deviation are taken over all samples of all
micro-steps and ranks.

Nothing here synchronises with the host before `PackedMetrics.record`. So a key without values (a
mean of zero weight, the maximum of nothing) is stored as 0 with `present` = 0, and `record` leaves
it out. A NaN among the values is recorded, so that a diverged loss shows.

Source: docs/lensnet-pairwise-training.md, "Preference learning", telemetry.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Number = Tensor | float
PERCENTILE = 0.95


class PackedMetrics(NamedTuple):
    """Finished metrics in one tensor, so that a single asynchronous copy to pinned memory moves
    them all to the host.
    """

    names: tuple[str, ...]
    table: Tensor
    """float64 [names, 2]: the value, and 1 if the key has values, else 0."""

    def record(self) -> dict[str, float]:
        """Return the metrics that have values as Python numbers, by name. Waits for the device."""
        rows: list[list[float]] = self.table.tolist()
        found = {
            name: value for name, (value, present) in zip(self.names, rows, strict=True) if present
        }
        return dict(sorted(found.items()))


Layout = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
"""Names and shapes of the parts of each kind: means, sums, maxima, minima, samples."""


class FlatStatistics(NamedTuple):
    """`Statistics` as one vector, which compiled code can return."""

    vector: Tensor
    """float64: all parts, concatenated."""
    layout: Layout
    """Names and shapes of the parts, in the order of the vector."""


@dataclass
class Statistics:
    """Metrics by name, each with its reduction. All parts are float64, on the device of the
    recorded tensors; Python numbers are placed on `device`.

    `merge` combines micro-steps and `all_reduce` combines ranks; both return a new object.
    """

    device: torch.device | str = "cpu"
    means: dict[str, Tensor] = field(default_factory=dict)
    """[2]: numerator, denominator."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """0-d."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """0-d; minus infinity where nothing was recorded."""
    minima: dict[str, Tensor] = field(default_factory=dict)
    """0-d; infinity where nothing was recorded."""
    samples: dict[str, Tensor] = field(default_factory=dict)
    """[2, n]: the samples, and 1 where a sample counts."""

    def add_mean(self, name: str, numerator: Number, denominator: Number) -> None:
        """Record numerator / denominator, both 0-d. Repeated calls for one name add up both."""
        pair = torch.stack((self._tensor(numerator), self._tensor(denominator)))
        self.means[name] = self.means[name] + pair if name in self.means else pair

    def add_sum(self, name: str, value: Number) -> None:
        """Record a count or another total, 0-d."""
        total = self._tensor(value)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def add_max(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Record the largest of `values` (any shape) among those in `mask` (default: all)."""
        largest = _masked(self._tensor(values), mask, -math.inf).amax()
        self.maxima[name] = (
            torch.maximum(self.maxima[name], largest) if name in self.maxima else largest
        )

    def add_min(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Record the smallest of `values` (any shape) among those in `mask` (default: all)."""
        smallest = _masked(self._tensor(values), mask, math.inf).amin()
        self.minima[name] = (
            torch.minimum(self.minima[name], smallest) if name in self.minima else smallest
        )

    def add_samples(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Record `values` (any shape) as samples, those in `mask` only (default: all). They become
        `{name}_mean`, `{name}_p95` and `{name}_std` (population standard deviation).
        """
        flat = self._tensor(values).flatten()
        counted = torch.ones_like(flat) if mask is None else mask.flatten().double()
        pair = torch.stack((_masked(flat, counted > 0, 0.0), counted))
        self.samples[name] = _append(self.samples[name], pair) if name in self.samples else pair

    def flat(self) -> FlatStatistics:
        """Return all parts as one new vector."""
        groups = (self.means, self.sums, self.maxima, self.minima, self.samples)
        layout = tuple(
            tuple((name, tuple(group[name].shape)) for name in sorted(group)) for group in groups
        )
        return FlatStatistics(_flatten(groups, self.device), layout)

    @staticmethod
    def from_flat(flat: FlatStatistics) -> "Statistics":
        """Return the statistics of `flat`; their tensors are views of its vector."""
        sizes = [math.prod(shape) for group in flat.layout for _, shape in group]
        pieces = iter(flat.vector.split(sizes))
        groups = [{name: next(pieces).view(shape) for name, shape in g} for g in flat.layout]
        return Statistics(flat.vector.device, *groups)

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the combined statistics of two micro-steps, with the keys of both."""
        return Statistics(
            device=self.device,
            means=_union(self.means, other.means, torch.add),
            sums=_union(self.sums, other.sums, torch.add),
            maxima=_union(self.maxima, other.maxima, torch.maximum),
            minima=_union(self.minima, other.minima, torch.minimum),
            samples=_union(self.samples, other.samples, _append),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> "Statistics":
        """Return the combined statistics of all ranks. Costs at most three collectives. Every rank
        must have the same keys with the same shapes.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        reduced = Statistics(device=self.device)
        additive = _flatten((self.means, self.sums), self.device)
        if additive.numel():
            dist.all_reduce(additive, op=dist.ReduceOp.SUM, group=group)
            reduced.means, reduced.sums = _unflatten(additive, (self.means, self.sums))
        extremes = _flatten((self.maxima, _negated(self.minima)), self.device)
        if extremes.numel():
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            reduced.maxima, minima = _unflatten(extremes, (self.maxima, self.minima))
            reduced.minima = _negated(minima)
        samples = _flatten((self.samples,), self.device)
        if samples.numel():
            ranks = samples.new_empty(dist.get_world_size(group), samples.numel())
            dist.all_gather_into_tensor(ranks.view(-1), samples, group=group)
            shards = [_unflatten(shard, (self.samples,))[0] for shard in ranks.unbind()]
            reduced.samples = {
                name: torch.cat([shard[name] for shard in shards], dim=1) for name in self.samples
            }
        return reduced

    def values(self) -> dict[str, Tensor]:
        """Return finished metrics by name, float64 0-d on the device. Keys without values are 0
        here; `record` leaves them out.
        """
        names, table = self.pack()
        return dict(sorted(zip(names, table[:, 0].unbind(), strict=True)))

    def pack(self) -> PackedMetrics:
        """Return finished metrics and their presence flags in one tensor."""
        names: list[str] = []
        blocks: list[Tensor] = []
        if self.sums:
            totals = torch.stack(list(self.sums.values()))
            names += self.sums
            blocks.append(torch.stack((totals, torch.ones_like(totals)), dim=1))
        if self.means:
            numerators, denominators = torch.stack(list(self.means.values())).unbind(1)
            names += self.means
            blocks.append(torch.stack(_ratio(numerators, denominators), dim=1))
        extremes = [*self.maxima.items(), *self.minima.items()]
        if extremes:
            values = torch.stack([value for _, value in extremes])
            present = ~values.isinf()
            names += [name for name, _ in extremes]
            blocks.append(torch.stack((torch.where(present, values, 0.0), present.double()), dim=1))
        for name, (values, counted) in self.samples.items():
            names += [f"{name}_{what}" for what in ("mean", "p95", "std")]
            blocks.append(_summary(values, counted))
        empty = torch.empty(0, 2, dtype=torch.float64, device=self.device)
        return PackedMetrics(tuple(names), torch.cat(blocks) if blocks else empty)

    def record(self) -> dict[str, float]:
        """Return all metrics that have values as Python numbers. Waits for the device."""
        return self.pack().record()

    def _tensor(self, value: Number) -> Tensor:
        """Return `value` as a detached float64 tensor. A Python number is filled in on the device,
        which avoids a copy from the host.
        """
        if isinstance(value, Tensor):
            return value.detach().double()
        return torch.full((), float(value), dtype=torch.float64, device=self.device)


def _masked(values: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    return values if mask is None else torch.where(mask, values, fill)


def _ratio(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    present = denominator != 0
    return torch.where(
        present, numerator / torch.where(present, denominator, 1.0), 0.0
    ), present.double()


def _summary(values: Tensor, counted: Tensor) -> Tensor:
    """Return mean, 95th percentile (linearly interpolated) and population standard deviation of the
    samples that count, each with a presence flag: [3, 2].
    """
    count = counted.sum()
    mean, present = _ratio((values * counted).sum(), count)
    variance, _ = _ratio(((values - mean).square() * counted).sum(), count)
    ordered = torch.where(counted > 0, values, math.inf).sort().values
    rank = PERCENTILE * (count - 1).clamp_min(0)
    places = torch.stack((rank.floor(), rank.ceil())).long()
    below, above = ordered.gather(0, places).unbind()  # a 0-d index would synchronise
    percentile = torch.where(present > 0, torch.lerp(below, above, rank.frac()), 0.0)
    return torch.stack((torch.stack((mean, percentile, variance.sqrt())), present.expand(3)), dim=1)


def _append(mine: Tensor, theirs: Tensor) -> Tensor:
    return torch.cat((mine, theirs), dim=1)


def _union(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    both = {name: combine(mine[name], theirs[name]) for name in mine if name in theirs}
    return {**mine, **theirs, **both}


def _negated(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: -value for name, value in parts.items()}


def _flatten(groups: Sequence[dict[str, Tensor]], device: torch.device | str) -> Tensor:
    """Return all parts in one new float64 vector, sorted by name within each group so that every
    rank has the same order.
    """
    parts = [group[name].flatten() for group in groups for name in sorted(group)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=device)


def _unflatten(flat: Tensor, groups: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the inverse of `_flatten`, with the names and shapes of `groups`."""
    sizes = [group[name].numel() for group in groups for name in sorted(group)]
    pieces = iter(flat.split(sizes))
    return [{name: next(pieces).view_as(group[name]) for name in sorted(group)} for group in groups]
