"""The line of progress where there is no terminal."""

import pytest

from mc_ds.data.preparation.progress import Progress


@pytest.mark.parametrize(
    ("total", "seconds", "line"),
    [
        (100_000_000, 10.0, "data: 10.0 MB, 1.00 MB/s, 10%, 1 min 30 s left"),
        (100_000_000, 5.0, "data: 10.0 MB, 2.00 MB/s, 10%, 0 min 45 s left"),
        (129_600_000, 10.0, "data: 10.0 MB, 1.00 MB/s, 8%, 2 min 00 s left"),
        (9_000_000, 10.0, "data: 10.0 MB, 1.00 MB/s, 111%, 0 min 00 s left"),
        (0, 10.0, "data: 10.0 MB, 1.00 MB/s"),
    ],
)
def test_the_line_has_rate_share_and_time_left(total: int, seconds: float, line: str) -> None:
    progress = Progress(total, print)
    progress.update(10_000_000)
    assert progress.line(seconds) == line
    progress.close()
