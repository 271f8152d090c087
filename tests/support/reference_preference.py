"""Preference learning written out per entry and per pair in plain Python: slow, and checkable
against the design by reading.

A row is a list of entries (lod, start). Scores are float64 tensors, read one element at a time,
so that autograd gives reference gradients.
"""

import math
import random
from dataclasses import dataclass

import torch

from mc_ds.config import MCConfig

Entry = tuple[int, int]
Row = list[Entry]


def random_rows(rng: random.Random, config: MCConfig, rows: int) -> list[Row]:
    """Full-coverage rows of exactly train_wc_length entries, by folding random complete groups
    of siblings, coarse ones at will.
    """
    return [_random_row(rng, config) for _ in range(rows)]


def _random_row(rng: random.Random, config: MCConfig) -> Row:
    children, head = config.block_size, config.geometry.head_len
    eager = rng.random()
    while True:
        row = {(0, start) for start in range(config.seq_len)}
        while len(row) > config.train_wc_length:
            groups = [
                (lod + 1, start)
                for lod in range(config.max_lod)
                for start in range(0, head - children ** (lod + 1) + 1, children ** (lod + 1))
                if all((lod, start + i * children**lod) in row for i in range(children))
            ]
            if not groups:
                break
            coarse = [group for group in groups if group[0] > 1]
            lod, start = rng.choice(coarse if coarse and rng.random() < eager else groups)
            row -= {(lod - 1, start + i * children ** (lod - 1)) for i in range(children)}
            row.add((lod, start))
        if len(row) == config.train_wc_length:
            return sorted(row, key=lambda entry: entry[1])
        eager = 1.0


def baseline_row(config: MCConfig) -> Row:
    return [(0, start) for start in range(config.seq_len - config.train_wc_length, config.seq_len)]


def as_tensors(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    plan = torch.tensor(rows)
    return plan[..., 0], plan[..., 1]


def tokens_of(entry: Entry, children: int) -> set[int]:
    lod, start = entry
    return set(range(start, start + children**lod))


def decision(a: Row, b: Row, i: int, config: MCConfig) -> tuple[int, float]:
    """(d, w) of entry i of a."""
    children = config.block_size
    mine = tokens_of(a[i], children)
    covered = set().union(*(tokens_of(entry, children) for entry in b))
    if a[i][1] >= config.geometry.head_len or not mine <= covered:
        return 0, 0.0
    overlapping = [entry for entry in b if tokens_of(entry, children) & mine]
    if len(overlapping) > 1:
        return 1, (len(overlapping) - 1) / (children - 1)
    node = overlapping[0]
    if node[0] > a[i][0]:
        under = [entry for entry in a if tokens_of(entry, children) <= tokens_of(node, children)]
        return -1, (len(under) - 1) / (children - 1) / len(under)
    return 0, 0.0


def centre(row: Row, scores: torch.Tensor, lod: int, config: MCConfig) -> torch.Tensor:
    head = [i for i, entry in enumerate(row) if entry[1] < config.geometry.head_len]
    same = [i for i in head if row[i][0] == lod]
    if lod > 0 and len(same) < 4:
        same = [i for i in head if row[i][0] > 0]
    return torch.stack([scores[i] for i in same]).mean()


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@dataclass
class Move:
    """One ordered pair (a, b) with decisions."""

    a: int
    b: int
    gain: float
    decisions: list[tuple[int, float]]
    margin: torch.Tensor
    v: float = 0.0


def all_moves(
    rows: list[Row], scores: torch.Tensor, row_scores: list[float], first: int, config: MCConfig
) -> list[Move]:
    moves = []
    for a in range(first, len(rows)):
        for b in range(first, len(rows)):
            if a == b or not (math.isfinite(row_scores[a]) and math.isfinite(row_scores[b])):
                continue
            decisions = [decision(rows[a], rows[b], i, config) for i in range(len(rows[a]))]
            total = sum(w for _, w in decisions)
            if total > 0:
                margin = sum(
                    w * d * scores[a, i] for i, (d, w) in enumerate(decisions) if w
                ) / math.sqrt(total)
                moves.append(
                    Move(a, b, row_scores[a] - row_scores[b], decisions, torch.as_tensor(margin))
                )
    return moves


def selected(
    moves: list[Move], row_scores: list[float], config: MCConfig, rows: int, first: int
) -> list[Move]:
    pairs = {tuple(sorted((move.a, move.b))): abs(move.gain) for move in moves}
    if not pairs:
        return []
    best = min(
        (i for i in range(1, rows) if math.isfinite(row_scores[i])), key=lambda i: row_scores[i]
    )
    order = sorted(pairs, key=lambda pair: (best not in pair, -pairs[pair]))
    count = rows - first
    kept = max(
        1,
        round(
            config.lens_hard_negative_ratio * min(config.max_lens_pairs, count * (count - 1) // 2)
        ),
    )
    return [move for move in moves if tuple(sorted((move.a, move.b))) in order[:kept]]


def one_sided(
    row: Row, scores: torch.Tensor, move: Move, side: int, config: MCConfig
) -> torch.Tensor | None:
    terms = [(i, w) for i, (d, w) in enumerate(move.decisions) if d == side and w > 0]
    if not terms:
        return None
    return (
        side
        * sum(w * (scores[i] - centre(row, scores, row[i][0], config)) for i, w in terms)
        / math.sqrt(sum(w for _, w in terms))
    )


def move_loss(row: Row, scores: torch.Tensor, move: Move, config: MCConfig) -> torch.Tensor:
    sign, tau = (move.gain > 0) - (move.gain < 0), config.lens_temperature
    if config.lens_objective == "entry":
        weigh = {1: 1.0, -1: config.lens_collapse_weight, 0: 0.0}
        weights = [w * weigh[d] for d, w in move.decisions]
        losses = [softplus(-sign * d * scores[i] / tau) for i, (d, _) in enumerate(move.decisions)]
        loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / (sum(weights) or 1.0)
    else:
        terms = [(1.0, move.margin)]
        if config.lens_split_margins:
            sides = (
                (1.0, one_sided(row, scores, move, +1, config)),
                (config.lens_collapse_weight, one_sided(row, scores, move, -1, config)),
            )
            terms += [(weight, margin) for weight, margin in sides if margin is not None]
        loss = sum(weight * softplus(-sign * margin / tau) for weight, margin in terms) / sum(
            weight for weight, _ in terms
        )
    hinge = torch.clamp(config.lens_margin - sign * move.margin, min=0)
    head = [i for i, entry in enumerate(row) if entry[1] < config.geometry.head_len]
    spans = {i: config.block_size ** row[i][0] for i in head}
    expand_mass = sum(spans[i] * torch.clamp(scores[i], min=0) for i in head) / sum(spans.values())
    collapse_mass = sum(spans[i] * torch.clamp(-scores[i], min=0) for i in head) / sum(
        spans.values()
    )
    return (
        loss
        + config.lens_rank_weight * hinge
        + config.lens_budget_weight * (expand_mass - collapse_mass) ** 2
    )


@dataclass
class ReferenceResult:
    numerator: torch.Tensor
    denominator: float
    moves: list[list[Move]]
    """Of every sequence, all with decisions; v is 0 for those not selected."""

    @property
    def loss(self) -> torch.Tensor:
        return self.numerator / (self.denominator or 1.0)


def preference(
    sequences: list[list[Row]],
    scores: torch.Tensor,
    row_scores: list[list[float]],
    config: MCConfig,
    std: float | None = None,
) -> ReferenceResult:
    """`sequences` [B][G] rows, baseline first; `scores` float64 [B, G, W]; `std` of gains, None:
    this batch's own.
    """
    first = 0 if config.lens_pair_baseline else 1
    of_sequence = [
        all_moves(rows, scores[n], row_scores[n], first, config) for n, rows in enumerate(sequences)
    ]
    gains = [move.gain for moves in of_sequence for move in moves]
    if std is None:
        std = math.sqrt(sum(g * g for g in gains) / len(gains)) if gains else 0.0
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for n, moves in enumerate(of_sequence):
        for move in selected(moves, row_scores[n], config, len(sequences[n]), first):
            move.v = math.tanh(abs(move.gain) / std) if std else float(move.gain != 0)
            numerator = numerator + move.v * move_loss(
                sequences[n][move.a], scores[n, move.a], move, config
            )
            denominator += move.v
    return ReferenceResult(numerator, denominator, of_sequence)


def correlation(moves: list[Move]) -> float | None:
    """Pearson correlation of margins with score(b) - score(a); None without variance."""
    if len(moves) < 2:
        return None
    x = [float(move.margin) for move in moves]
    y = [-move.gain for move in moves]
    x, y = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    spread = math.sqrt(sum(v * v for v in x) * sum(v * v for v in y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / spread if spread > 1e-9 else None
