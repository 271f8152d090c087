"""The summary of a run: right figures, curves that exist, and one clear line where there is
nothing to show.
"""

import json
from pathlib import Path

import pytest
from reporting.runs import open_run

from tools.summarize_run import main


def write(run: Path, records: list[dict[str, object]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + tail
    )


def test_summary_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict[str, object]] = [
        {
            "step": s,
            "train/loss": 8 - s,
            "train/tokens_per_s": 1000.0,
            "mc/lensnet_calls": 2 * s,
            "mc/lens_loss": 0.7,
        }
        for s in range(5)
    ]
    records[0]["val/loss"] = 8.5
    records[4] |= {
        "val/loss": 5.25,
        "mc/preference_corr_mean": -0.5,
        "mc/preference_corr_lod_only": 0.01,
    }
    write(tmp_path, records)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "8.5000 (step 0) -> 5.2500 (step 4), fell by 3.2500 nats" in out
    for text in (
        "1,000.0 (mean of the last 5)",
        "mc/lensnet_calls              8\n",
        "-0.500",
        "+0.010",
        str(tmp_path / "metrics.jsonl"),
    ):
        assert text in out
    assert (tmp_path / "metrics.png").stat().st_size > 10_000


def test_missing_keys_and_missing_values_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        tmp_path,
        [
            {"step": 0, "train/loss": float("nan"), "mc/lens_loss": None},
            {"step": 1, "train/loss": 3.0},
        ],
    )
    assert open_run(tmp_path).series("train/loss") == [(1, 3.0)]
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "lens_loss" not in out
    assert "val/loss" not in out


def test_repeated_steps_and_a_last_line_cut_short(tmp_path: Path) -> None:
    write(
        tmp_path,
        [{"step": 0, "a": 1}, {"step": 1, "a": 2}, {"step": 1, "a": 3}],
        tail='{"step": 2, "a"',
    )
    assert open_run(tmp_path).series("a") == [(0, 1.0), (1, 3.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: give the folder of a run"),
        ("", "is empty: the run stopped"),
        ('{"step": 0}\n[1]\n{"step": 2}\n', "line 2: '[1]'"),
    ],
)
def test_nothing_to_show_is_one_line_and_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_two_runs_are_compared_where_both_have_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps, rate in (("ours", 4, 1e-3), ("theirs", 6, 3e-3)):
        (tmp_path / name).mkdir()
        records: list[dict[str, object]] = [
            {"step": s, "train/loss": 8.0 - s, "val/loss": 9.0 - s - rate} for s in range(steps + 1)
        ]
        write(tmp_path / name, records)
        (tmp_path / name / "config.yaml").write_text(
            f"name: {name}\ntrain:\n  learning_rate: {rate}\n  total_steps: 9\n"
        )
        evaluated = [dict(task="recall", policy="lens", budget=0.5, wc_length=8, seq_len=16, n=3)]
        evaluated[0] |= dict(horizon_loss=rate, losses=[rate] * 3, ids=[0, 1, 2])
        (tmp_path / name / "eval.json").write_text(json.dumps(evaluated))
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path / 'ours'} (4 steps) against {tmp_path / 'theirs'} (6)"
    assert out[1].split() == ["train.learning_rate", "0.001", "<-", "0.003"]
    by_key = {line.split()[0]: line.split()[1:] for line in out[3:]}
    assert by_key["val/loss"] == ["4.999", "4.997", "+0.002", "step", "4"]
    assert by_key["train/loss"][:3] == ["6", "6", "+0"], "both up to step 4"
    assert by_key["recall,"][:4] == ["lens", "0.0010", "0.0030", "-0.0020"]
    assert not (tmp_path / "ours" / "metrics.png").exists()
