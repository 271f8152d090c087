"""What a score of the level of detail alone can win: nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.preference import loss as loss_module
from mc_ds.preference import preference_loss
from mc_ds.preference.objective import (
    Rows,
)
from mc_ds.preference.pairs import select_pairs
from tests.support.preferences import Batch, allocator_batch, planted_batch, small_config
from tests.support.reference_preference import (
    correlation,
)

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("variants", "sequences", "seed"), [(4, 3, 5), (4, 3, 6), (4, 3, 7), (3, 2, 1), (3, 2, 3)]
)
def test_the_control_is_the_correlation_of_mean_scores_per_lod(
    variants: int, sequences: int, seed: int
) -> None:
    """The mean is that of all variants of the batch outside the tail; counts of levels differ
    between variants here. In the small batches a single gist is of LOD2.
    """
    batch = Batch(small_config(num_random_variants=variants), sequences, seed)
    of_lod: dict[int, list[float]] = {0: [], 1: [], 2: []}
    rows = [row for sequence in batch.sequences for row in sequence]
    for number, row in enumerate(rows):
        for i, (lod, start) in enumerate(row):
            if number % (variants + 1) and start < batch.config.geometry.head_len:
                of_lod[lod].append(float(batch.scores[number, i]))
    assert (len(of_lod[2]) == 1) == (variants == 3)
    mean = {lod: sum(scores) / len(scores) for lod, scores in of_lod.items()}
    assert max(mean.values()) - min(mean.values()) > 0.01
    replaced = torch.tensor([[mean[lod] for lod, _ in row] for row in rows], dtype=torch.float64)
    found = [
        value for value in map(correlation, batch.reference(replaced).moves) if value is not None
    ]
    expected = sum(found) / len(found)
    assert abs(expected) > 0.05, "or its sign would not show"
    assert batch.loss().statistics.record()["mc/preference_corr_lod_only"] == pytest.approx(
        expected, abs=1e-6
    )


def test_a_perfect_scorer_correlates_as_the_noise_permits() -> None:
    config = small_config(
        seq_len=64, block_size=2, max_lod=1, train_wc_length=50, num_random_variants=5
    )
    for noise, expected in ((0.0, -0.99), (0.5, -0.87), (1.0, -0.67)):
        batch, scores = planted_batch(config, sequences=60, noise=noise)
        record = batch.loss(scores).statistics.record()
        assert record["mc/preference_corr_mean"] == pytest.approx(expected, abs=0.06), noise
        assert abs(record["mc/preference_corr_lod_only"]) < 1e-3


def lowest_lod_only_loss(loss_of: Any, levels: int) -> float:
    """The lowest loss that gradient descent finds for free scores per LOD, from several starts."""
    lowest = math.inf
    for seed in range(2):
        per_lod = torch.randn(
            levels, generator=torch.Generator().manual_seed(seed)
        ).requires_grad_()
        optimizer = torch.optim.Adam([per_lod], lr=0.2)
        for _ in range(40):
            optimizer.zero_grad()
            loss = loss_of(per_lod)
            loss.backward()
            optimizer.step()
            lowest = min(lowest, float(loss.detach()))
    return lowest


@pytest.mark.parametrize(("max_lod", "bound"), [(1, LN2 - 1e-5), (2, 0.69)])
@pytest.mark.parametrize(
    "options",
    [{}, {"lens_split_margins": False}, {"lens_objective": "entry"}],
    ids=["split", "joint", "entry"],
)
def test_no_score_of_the_lod_alone_wins(
    max_lod: int, bound: float, options: dict[str, Any]
) -> None:
    rows, row_scores, config = allocator_batch(max_lod, sequences=24)
    assert rows.lods.max() == max_lod
    loss_of = loss_of_lods(rows, row_scores, config.model_copy(update=options))
    assert bound <= lowest_lod_only_loss(loss_of, max_lod + 1) < 0.72


def loss_of_lods(rows: Rows, row_scores: Tensor, config: MCConfig) -> Any:
    """The preference loss as a function of one score per LOD. The baseline is only a place
    holder here: it takes no part.
    """
    lods, starts = (torch.cat((x[:, :1], x), 1).flatten(0, 1) for x in (rows.lods, rows.starts))
    scores_of_rows = torch.cat((row_scores[:, :1], row_scores), 1).flatten()

    def loss_of(per_lod: Tensor) -> Tensor:
        return preference_loss(
            per_lod[lods], lods, starts, scores_of_rows, rows_per_sequence=5, config=config
        ).loss

    return loss_of


@pytest.mark.parametrize(("split", "bound"), [(False, 0.1), (True, 0.55)])
def test_supervising_only_the_worse_row_is_won_by_the_lod_alone(
    monkeypatch: pytest.MonkeyPatch, split: bool, bound: float
) -> None:
    """Why both directions teach, and that the test above discriminates: gists high and tokens
    low wins.

    The one-sided margins are relative to their LOD, so two of the three terms stay at ln 2: (0 +
    2 ln 2) / 3 = 0.46.
    """
    rows, row_scores, config = allocator_batch(1, sequences=24)
    monkeypatch.setattr(
        loss_module, "select_pairs", lambda gain, *rest: select_pairs(gain, *rest) & (gain > 0)
    )
    config = config.model_copy(update={"lens_split_margins": split})
    assert lowest_lod_only_loss(loss_of_lods(rows, row_scores, config), 2) < bound


def test_counts_that_differ_between_variants_let_the_lod_alone_win() -> None:
    """Why the number of LOD2 spans is shared: a span makes room for more open tokens, and here
    each is worth the same.
    """
    lowest = [
        lowest_lod_only_loss(
            loss_of_lods(*allocator_batch(2, sequences=24, shared=shared, worth=4.0)), 3
        )
        for shared in (True, False)
    ]
    assert lowest[0] >= 0.69
    assert lowest[1] < 0.65
