"""How often a run reads its data, in words."""

from mc_ds.data.sampling.epochs import repetition


def test_what_is_read_more_than_four_times_is_named() -> None:
    epochs = {"books": 4.0, "code": 4.6, "recall": 1551.2}
    line = repetition(epochs, steps=60_000)
    assert line is not None
    assert line.startswith("data: 60,000 steps read code 5 times, recall 1,551 times; after about")
    assert "books" not in line
    assert repetition({"books": 4.0}, steps=10) is None
