"""LOD arithmetic written out per entry in plain Python: slow, and checkable against the design
by reading.
"""

import random
import statistics
from itertools import product

from mc_ds.geometry import Geometry

Entry = tuple[int, int]
"""(level, first token)."""


def tokens_of(entry: Entry, children: int) -> list[int]:
    level, start = entry
    return list(range(start, start + children**level))


def node_table(geometry: Geometry) -> list[Entry]:
    """Every whole node of the tree in the order of the table: all tokens, all LOD1 nodes, all
    LOD2 nodes, ...
    """
    nodes = []
    for level in range(geometry.max_lod + 1):
        span = geometry.block_size**level
        nodes += [
            (level, start)
            for start in range(0, geometry.seq_len, span)
            if start + span <= geometry.seq_len
        ]
    return nodes


def mean_and_deviation(entry: Entry, children: int) -> tuple[float, float]:
    """Of the token positions that the entry covers."""
    positions = tokens_of(entry, children)
    return statistics.fmean(positions), statistics.pstdev(positions)


def label(entry: Entry, children: int) -> int:
    """The token after the last one that the entry covers."""
    return tokens_of(entry, children)[-1] + 1


def entries_before(row: list[Entry], token: int) -> int:
    return sum(1 for _, start in row if start < token)


def lod_of_token(row: list[Entry], token: int, children: int) -> int:
    """-1 where no entry covers the token."""
    covering = [entry[0] for entry in row if token in tokens_of(entry, children)]
    assert len(covering) <= 1
    return covering[0] if covering else -1


def reachable_lengths(geometry: Geometry) -> list[int]:
    """Every number of entries of a full cover, by combining the possible sizes of every node,
    bottom up.
    """
    children = geometry.block_size
    head = max(0, geometry.seq_len - geometry.recent_tokens) // children * children
    sizes_of_node = [{1}]
    for _ in range(geometry.max_lod):
        sizes_of_node.append({1} | _sums([sizes_of_node[-1]] * children))
    parts, start = [], 0
    while start < head:  # the coarsest node that fits, then what is left of the head
        level = max(
            level
            for level in range(geometry.max_lod + 1)
            if start % children**level == 0 and start + children**level <= head
        )
        parts.append(sizes_of_node[level])
        start += children**level
    return sorted(size + geometry.seq_len - head for size in _sums(parts))


def _sums(parts: list[set[int]]) -> set[int]:
    totals = {0}
    for sizes in parts:
        totals = {total + size for total, size in product(totals, sizes)}
    return totals


def draw_lod2_count(
    rng: random.Random,
    *,
    units: int,
    children: int,
    blocks: int,
    spans: int,
    probability: float,
    max_share: float,
) -> int:
    """The law of LOD2 counts as a loop over draws: take a span with the probability while the
    remaining reduction permits it.
    """
    cost = children + 1
    remaining, count = units, 0
    while remaining > 0:
        if rng.random() < probability and remaining >= cost:
            remaining -= cost
            count += 1
        else:
            remaining -= 1
    if max_share < 1:
        most = round(max_share * units / cost)
        if units >= cost:
            most = max(most, 1)
        count = min(count, rng.randint(0, most))
    count = min(count, spans)
    while units - count * cost > blocks - count * children:  # LOD1 alone cannot reach W
        count += 1
    return count
