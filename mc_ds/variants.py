"""The training allocator: draws random full-coverage working contexts of an exact length, on the
CPU and without any model.

A variant is a pure function of (seed, global sample index, variant index, W), so it is the same on
any number of ranks or workers and after a restart. Source: docs/model.md,
"Geometry and the training allocator".

Legend: N variants, W entries, K block size, L coarsest level, c units of K - 1 entries to remove,
n_1 head blocks.
"""

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import MCConfig
from mc_ds.geometry import Geometry, distant_blocks

Plan = tuple[NDArray[np.int64], NDArray[np.int64]]


class TrainingWCVariationAllocator:
    """Draws random full-coverage working contexts of exactly `train_wc_length` entries.

    All variants of one sequence have the same number of nodes at each level and differ only in
    *where* detail lies. With `random_blocks` they are not covers but tokens alone (see `MCConfig`).
    Raises ValueError for an unreachable length, naming the nearest reachable
    ones.
    """

    def __init__(
        self,
        geometry: Geometry,
        train_wc_length: int,
        *,
        lod2_probability: float = 0.1,
        lod2_max_share: float = 0.5,
        random_variant_iterations: int = 4,
        random_blocks: int = 0,
    ) -> None:
        """Store the options, which `MCConfig` documents and validates."""
        self.geometry = geometry.check_wc_length(train_wc_length)
        self.train_wc_length = train_wc_length
        self.lod2_probability = lod2_probability
        self.lod2_max_share = lod2_max_share
        self.random_variant_iterations = random_variant_iterations
        self.random_blocks = random_blocks

    @classmethod
    def of(cls, mc: MCConfig, train_wc_length: int) -> "TrainingWCVariationAllocator":
        """Return the allocator for a configuration and working contexts of `train_wc_length`
        entries.
        """
        return cls(
            mc.geometry,
            train_wc_length,
            lod2_probability=mc.training_lod2_probability,
            lod2_max_share=mc.training_lod2_max_share,
            random_variant_iterations=mc.random_variant_iterations,
            random_blocks=mc.random_blocks,
        )

    def baseline(self) -> Plan:
        """Return the recency window, the last W tokens at LOD0: `lods` and `starts`, int64 [W]
        each.
        """
        seq_len, length = self.geometry.seq_len, self.train_wc_length
        return np.zeros(length, np.int64), np.arange(seq_len - length, seq_len, dtype=np.int64)

    def sample(self, num_variants: int, seed: tuple[int, ...]) -> Plan:
        """Return the variants of one sequence: `lods` and `starts`, int64 [N, W] each.

        `seed` is (seed, global sample index). Repeated covers are redrawn until all differ, at most
        `random_variant_iterations` - 1 times; variants of tokens alone are not.
        """
        root = [*seed, self.train_wc_length]
        if self.random_blocks:
            return self._sample_blocks(num_variants, np.random.default_rng([*root, 1]))
        counts = self._draw_counts(np.random.default_rng([*root, 0]))
        block_lods = self._place(counts, num_variants, np.random.default_rng([*root, 1]))
        for attempt in range(1, self.random_variant_iterations):
            repeats = _repeats(block_lods)
            if not repeats.any():
                break
            again = self._place(counts, num_variants, np.random.default_rng([*root, 1 + attempt]))
            block_lods = np.where(repeats[:, None], again, block_lods)
        return self._entries(block_lods)

    def _sample_blocks(self, num_variants: int, rng: np.random.Generator) -> Plan:
        """Return variants of tokens alone: the tail, `random_blocks` blocks, and the latest other
        tokens.

        Each choice of blocks before the latest tokens is equally likely. The draws of all variants
        are made from one stream, row by row.
        """
        geometry, block = self.geometry, self.geometry.block_size
        distant = distant_blocks(geometry, self.train_wc_length, self.random_blocks)
        keys = rng.random((num_variants, distant))
        chosen = np.sort(np.argsort(keys, axis=1)[:, : self.random_blocks], axis=1)
        opened = (chosen[:, :, None] * block + np.arange(block)).reshape(num_variants, -1)
        first = geometry.seq_len - self.train_wc_length + opened.shape[1]
        latest = np.broadcast_to(
            np.arange(first, geometry.seq_len), (num_variants, geometry.seq_len - first)
        )
        starts = np.concatenate([opened, latest], axis=1).astype(np.int64)
        return np.zeros_like(starts), starts

    def _draw_counts(self, rng: np.random.Generator) -> list[int]:
        """Draw the number of spans per level (the number at LOD0 is unused).

        The number at a level follows the law of draws, limited by a random cap, and is raised where
        the lower levels alone could not reach W.
        """
        geometry, block = self.geometry, self.geometry.block_size
        available = list(geometry.head_nodes)
        units = geometry.units(self.train_wc_length)
        counts = [0] * (geometry.max_lod + 1)
        for level in range(geometry.max_lod, 1, -1):
            # Units that one span of this level removes.
            cost = (block**level - 1) // (block - 1)
            drawn = self._law_of_draws(units, cost, rng)
            cap = (
                rng.integers(self._max_spans(units, cost) + 1) if self.lod2_max_share < 1 else units
            )
            forced = units - sum(available[1:level])
            count = int(max(min(drawn, cap, available[level]), forced))
            counts[level] = count
            units -= count * cost
            available = [
                nodes - count * block ** (level - lower)
                for lower, nodes in enumerate(available[:level])
            ]
        counts[1] = units
        return counts

    def _law_of_draws(self, units: int, cost: int, rng: np.random.Generator) -> int:
        """Simulate draws that use up `units`, and return how many of them take a span of `cost`
        units.

        Each draw takes a span with probability `lod2_probability` if enough units are left, else a
        single unit.
        """
        wanted = rng.random(units) < self.lod2_probability
        spent_before = np.cumsum(np.where(wanted, cost, 1)) - np.where(wanted, cost, 1)
        return int((wanted & (spent_before + cost <= units)).sum())

    def _max_spans(self, units: int, cost: int) -> int:
        """Return u_max, the number of spans that `lod2_max_share` of the reduction allows; at least
        one where one fits.
        """
        return max(round(self.lod2_max_share * units / cost), int(units >= cost))

    def _place(
        self, counts: list[int], num_variants: int, rng: np.random.Generator
    ) -> NDArray[np.int8]:
        """Choose the LOD of every head block, int8 [N, n_1], coarsest level first: at each level
        the free nodes with the smallest random keys are collapsed.
        """
        geometry, block = self.geometry, self.geometry.block_size
        block_lods = np.zeros((num_variants, geometry.head_nodes[1]), np.int8)
        # Drawn row by row, so that a variant's keys do not depend on N.
        keys = rng.random((num_variants, sum(geometry.head_nodes[1:])))
        first = 0
        for level in range(geometry.max_lod, 0, -1):
            nodes, width = geometry.head_nodes[level], block ** (level - 1)
            level_keys = keys[:, first : first + nodes]
            first += nodes
            free = block_lods[:, : nodes * width : width] == 0
            chosen = np.argsort(np.where(free, level_keys, np.inf), axis=1)[:, : counts[level]]
            covered = np.zeros((num_variants, nodes), bool)
            np.put_along_axis(covered, chosen, True, axis=1)
            block_lods[:, : nodes * width][np.repeat(covered, width, axis=1)] = level
        return block_lods

    def _entries(self, block_lods: NDArray[np.int8]) -> Plan:
        """Convert block LODs [N, n_1] to plans. A token starts an entry where its position is a
        multiple of its node's span.
        """
        geometry = self.geometry
        rows = len(block_lods)
        token_lods = np.zeros((rows, geometry.seq_len), np.int64)
        token_lods[:, : geometry.head_len] = np.repeat(block_lods, geometry.block_size, axis=1)
        row, start = np.nonzero(np.arange(geometry.seq_len) % geometry.block_size**token_lods == 0)
        shape = (rows, self.train_wc_length)
        return token_lods[row, start].reshape(shape), start.reshape(shape).astype(np.int64)


def _repeats(block_lods: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return which rows equal an earlier row, bool [N]."""
    repeated = np.ones(len(block_lods), bool)
    repeated[np.unique(block_lods, axis=0, return_index=True)[1]] = False
    return repeated
