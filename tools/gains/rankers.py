"""Small networks that rank distant blocks, one for each set of inputs, trained on recorded gains.

A ranker scores every candidate of a slice from its features and from the products of a projected
query and key. Training maximises the expected gain of a block drawn by the softmax of the scores.
This gives little weight to low-scored blocks, whose gains are mostly noise.

Legend: N windows, S slices, C candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gains.inputs import Inputs
from gains.lexical import NAMES


class Reads(NamedTuple):
    """The inputs of a ranker, by name."""

    features: tuple[str, ...]
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()


RANKERS = {
    "recency": Reads(("distance",)),
    "words": Reads(("distance", "words")),
    "index": Reads(("distance",), ("free",), ("free",)),
    "context_query": Reads(("distance", "expected"), ("context",), ("free",)),
    "context_key": Reads(("distance", "salience"), ("free",), ("context",)),
    "context_both": Reads(("distance", "salience"), ("context",), ("context",)),
    "late": Reads(("distance", "late")),
    "own_heads": Reads(("distance", "own_heads")),
    "matches": Reads(("distance", "words", "expected", "late", "salience", "own_heads")),
    "all": Reads(
        ("distance", "words", "expected", "late", "salience", "own_heads"),
        ("free", "context"),
        ("free", "context"),
    ),
    "full_heads": Reads(("distance", "full_heads")),
    "matches_and_full_heads": Reads(
        ("distance", "words", "expected", "late", "salience", "own_heads", "full_heads")
    ),
}
"""Rankers by name. All inputs are available while decoding, except `full_heads`, which needs
attention over the whole history.
"""


@dataclass(frozen=True)
class Training:
    """Hyperparameters of rankers."""

    epochs: int = 12
    rate: float = 3e-3
    weight_decay: float = 0.05
    hidden: int = 48
    products: int = 24
    dropout: float = 0.4
    windows: int = 8
    """Windows per step."""
    clip: float = 0.3
    """Maximum absolute gain, in nats; larger ones are clipped."""
    regression: float = 3.0
    """Weight of the squared error of gains, relative to the expected gain."""
    seeds: int = 2
    """Number of rankers whose standardised scores are averaged."""


class Assembled(NamedTuple):
    """The input tensors of one ranker."""

    features: Tensor
    """[N, S, C, F]."""
    query: Tensor
    """[N, S, E]; E may be 0."""
    key: Tensor
    """[N, C, E]; E may be 0."""


def assemble(reads: Reads, inputs: Inputs) -> Assembled:
    """Concatenate the input tensors that a ranker reads."""
    rows, slices, candidates = inputs.gains.shape
    raw = torch.cat([inputs.features[name] for name in reads.features], -1)
    return Assembled(
        torch.cat([raw, raw - raw.mean(2, keepdim=True)], -1),
        torch.cat(
            [inputs.gains.new_empty(rows, slices, 0), *(inputs.queries[n] for n in reads.query)], -1
        ),
        torch.cat(
            [inputs.gains.new_empty(rows, candidates, 0), *(inputs.keys[n] for n in reads.key)], -1
        ),
    )


class Ranker(nn.Module):
    """A network that scores candidates."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, example: Assembled, training: Training) -> None:
        super().__init__()
        features = example.features.flatten(0, 2)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0) + 1e-4)
        self.products = training.products if example.query.size(-1) else 0
        if self.products:
            self.query = nn.Linear(example.query.size(-1), self.products)
            self.key = nn.Linear(example.key.size(-1), self.products)
        self.drop = nn.Dropout(training.dropout)
        self.net = nn.Sequential(
            nn.Linear(features.size(-1) + self.products, training.hidden),
            nn.GELU(),
            nn.Dropout(training.dropout),
            nn.Linear(training.hidden, 1),
        )

    def forward(self, inputs: Assembled) -> Tensor:
        """Return scores [N, S, C]."""
        x = ((inputs.features - self.mean) / self.deviation).clamp(-5, 5)
        if self.products:
            q, k = self.query(self.drop(inputs.query)), self.key(self.drop(inputs.key))
            x = torch.cat([x, q[:, :, None] * k[:, None]], dim=-1)
        return self.net(x).squeeze(-1)


def objective(scores: Tensor, gains: Tensor, training: Training) -> Tensor:
    """Return the loss: the weighted squared error of the scores as predictions of gains, minus the
    expected gain under the softmax of the scores.

    Gains are clipped, centred in each slice (which does not change the ranking) and standardised.
    """
    wanted = gains.clamp(-training.clip, training.clip)
    wanted = wanted - wanted.mean(-1, keepdim=True)
    wanted = wanted / wanted.std()
    expected = (scores.softmax(-1) * wanted).sum(-1).mean()
    level = scores - scores.mean(-1, keepdim=True)
    return training.regression * (0.1 * level - wanted).square().mean() - expected


def train_ranker(inputs: Assembled, gains: Tensor, training: Training, seed: int) -> Ranker:
    """Return a ranker trained on all windows of `inputs`, whose gains are [N, S, C]."""
    torch.manual_seed(seed)
    ranker = Ranker(inputs, training)
    optimizer = torch.optim.AdamW(
        ranker.parameters(), training.rate, weight_decay=training.weight_decay
    )
    steps = training.epochs * -(-len(gains) // training.windows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=steps)
    with torch.enable_grad():
        for _ in range(training.epochs):
            for rows in torch.randperm(len(gains)).split(training.windows):
                scores = ranker(Assembled(*(x[rows] for x in inputs)))
                optimizer.zero_grad()
                objective(scores, gains[rows], training).backward()
                optimizer.step()
                schedule.step()
    return ranker.eval()


def ensemble_scores(rankers: Sequence[Ranker], inputs: Assembled) -> Tensor:
    """Return the mean [N, S, C] of several rankers' scores, each standardised within its slice."""
    scores = [ranker(inputs) for ranker in rankers]
    return torch.stack(
        [(s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-6) for s in scores]
    ).mean(0)


def captured(scores: Tensor, gains: Tensor, size: int) -> Tensor:
    """Return the mean single-block gain of the `size` blocks with the best scores, [N, S]."""
    return gains.gather(-1, scores.topk(size, dim=-1).indices).mean(-1)


def score_all(
    training_inputs: Inputs, test_inputs: Inputs, training: Training
) -> Iterator[tuple[str, Tensor]]:
    """Train every ranker, and yield its name and its scores [N, S, C] on the test windows."""
    for name, reads in RANKERS.items():
        read = assemble(reads, training_inputs)
        rankers = [
            train_ranker(read, training_inputs.gains, training, seed)
            for seed in range(training.seeds)
        ]
        yield name, ensemble_scores(rankers, assemble(reads, test_inputs))


def untrained(inputs: Inputs) -> dict[str, Tensor]:
    """Return scores [N, S, C] that need no training: the longest suffix (with BM25 to break ties),
    and the late match of the last token.
    """
    words = inputs.features["words"]
    suffix, bm25 = words[..., NAMES.index("suffix")], words[..., NAMES.index("bm25_16")]
    return {
        "suffix": suffix.expm1() + bm25 / 100,
        "late_last": inputs.features["late"][..., ::2].mean(-1),
    }
