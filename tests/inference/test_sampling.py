"""Sampling: frequencies follow the probabilities that are kept, rows do not depend on their
neighbours, seeds repeat.
"""

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.sampling import Sampler, Sampling, kept_probabilities

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])


def test_greedy_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(), rows=2, device=CPU)
    assert sampler.draw(torch.cat([LOGITS, -LOGITS])).tolist() == [0, 3]


def test_what_is_kept_by_hand() -> None:
    whole = (LOGITS / 0.5).softmax(-1)
    torch.testing.assert_close(kept_probabilities(LOGITS, Sampling(0.5)), whole)
    assert kept_probabilities(LOGITS, Sampling(0.5, top_k=2)).nonzero()[:, 1].tolist() == [0, 4]
    # Probabilities at temperature 1: 0.46, 0.17, 0.06, 0.02, 0.28.
    assert kept_probabilities(LOGITS, Sampling(1.0, top_p=0.45)).nonzero()[:, 1].tolist() == [0]
    assert kept_probabilities(LOGITS, Sampling(1.0, top_p=0.5)).nonzero()[:, 1].tolist() == [0, 4]
    assert kept_probabilities(LOGITS, Sampling(1.0, top_p=0.8)).nonzero()[:, 1].tolist() == [
        0,
        1,
        4,
    ]
    # Of the two that top-k keeps, the likeliest has 0.62.
    assert kept_probabilities(LOGITS, Sampling(1.0, top_k=2, top_p=0.6)).nonzero()[
        :, 1
    ].tolist() == [0]
    assert kept_probabilities(LOGITS, Sampling(1.0, top_k=99, top_p=1.0)).nonzero()[
        :, 1
    ].tolist() == [0, 1, 2, 3, 4]


def test_frequencies_are_the_probabilities() -> None:
    sampling = Sampling(1.3, top_k=4, top_p=0.95, seed=5)
    sampler = Sampler(sampling, rows=1, device=CPU)
    drawn = torch.cat([sampler.draw(LOGITS) for _ in range(4000)])
    kept = kept_probabilities(LOGITS, sampling)[0]
    torch.testing.assert_close(
        drawn.bincount(minlength=5) / 4000, kept / kept.sum(), atol=0.03, rtol=0.0
    )


def test_a_row_draws_the_same_beside_others_and_again() -> None:
    alone = Sampler(Sampling(1.0, seed=3), rows=1, device=CPU)
    three = Sampler(Sampling(1.0, seed=3), rows=3, device=CPU)
    other = Sampler(Sampling(1.0, seed=4), rows=1, device=CPU)
    logits = torch.zeros(1, 50)
    first = [int(alone.draw(logits)) for _ in range(20)]
    assert first == [int(three.draw(logits.expand(3, -1))[2]) for _ in range(20)]
    assert first != [int(other.draw(logits)) for _ in range(20)]


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
