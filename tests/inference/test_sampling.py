"""Sampling: frequencies follow the probabilities that are kept, rows do not depend on their
neighbours, seeds repeat.
"""

import numpy as np
import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.sampling import Sampler, Sampling, kept_probabilities

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])


def sampler(sampling: Sampling, rows: int = 1) -> Sampler:
    return Sampler(sampling, seeds=[(0,)] * rows, device=CPU)


def test_greedy_takes_the_likeliest() -> None:
    assert sampler(Sampling(), 2).draw(torch.cat([LOGITS, -LOGITS]), [0, 0]).tolist() == [0, 3]


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
    draws = sampler(sampling)
    drawn = torch.cat([draws.draw(LOGITS, [place]) for place in range(4000)])
    kept = kept_probabilities(LOGITS, sampling)[0]
    torch.testing.assert_close(
        drawn.bincount(minlength=5) / 4000, kept / kept.sum(), atol=0.03, rtol=0.0
    )


@pytest.mark.parametrize("small", [1e-38, 1e-46, 5e-324])
def test_however_small_a_limit_is_the_likeliest_token_is_kept(small: float) -> None:
    logits = torch.tensor([[-3.0, 0.5, 7.0, 7.0 - 1e-3], [900.0, -900.0, 0.0, 1e4]])
    for sampling in (Sampling(small), Sampling(1.0, top_p=small), Sampling(small, 3, small)):
        kept = kept_probabilities(logits, sampling)
        assert kept.isfinite().all()
        assert kept.nonzero().tolist() == [[0, 2], [1, 3]]
        assert sampler(sampling, 2).draw(logits, [4, 4]).tolist() == [2, 3]


def test_as_many_tokens_are_kept_as_asked_for_whichever_are_equal() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    for k, kept in ((1, [[1], [0]]), (2, [[1, 2], [0, 1]]), (4, [[0, 1, 2, 4], [0, 1, 2, 3]])):
        found = kept_probabilities(logits, Sampling(1.0, top_k=k))
        assert [row.nonzero()[:, 0].tolist() for row in found] == kept
    assert sampler(Sampling(1.0, top_k=1), 2).draw(logits, [1, 1]).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 9.0], [0.0, -torch.inf, 9.0], [-torch.inf] * 3])
    drawn = sampler(Sampling(temperature, top_p=0.9), 3).draw(logits, [0, 0, 0])
    assert drawn.tolist() == [-1, 2, -1]


def test_a_draw_depends_on_seeds_and_place_alone() -> None:
    """Not on the rows beside it, nor on what was drawn before; one place says nothing of the
    next.
    """
    logits = torch.zeros(3, 50)

    def drawn(places: range, seed: int = 3, own: int = 0) -> list[int]:
        draws = Sampler(Sampling(1.0, seed=seed), seeds=[(own,)], device=CPU)
        return [int(draws.draw(logits[:1], [place])) for place in places]

    first = drawn(range(100, 140))
    assert first == drawn(range(100, 120)) + drawn(range(120, 140))
    assert first[::-1] == drawn(range(139, 99, -1))
    three = Sampler(Sampling(1.0, seed=3), seeds=[(7,), (0,), (8,)], device=CPU)
    assert first == [int(three.draw(logits, [5, place, 0])[1]) for place in range(100, 140)]
    others = [drawn(range(100, 140), seed=4), drawn(range(100, 140), own=1), drawn(range(40))]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
    counts = np.bincount(drawn(range(4000)), minlength=50)
    assert 35 < counts.min() <= counts.max() < 125  # five deviations around 80


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(seed=-1),
        dict(seed=0.5),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
