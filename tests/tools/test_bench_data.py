"""The benchmark of data: what it measures is there, beside its peers."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
from bench import data


@pytest.mark.slow  # prepares two datasets with programs of their own
def test_every_figure_has_its_peer_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("VOCABULARY", 400), ("TRAINED_ON", 50_000), ("SHARDS", 3)):
        monkeypatch.setattr(data, name, value)
    record = tmp_path / "data.jsonl"
    options = ["--megabytes", "0.2", "--input_megabytes", "1.5", "--workers", "1"]
    options += ["--repeats", "1", "--files", "12"]
    sizes: list[int] = []
    preparation = data.preparation

    def look(lines: Path, *others: Any) -> data.Figures:
        sizes.append(lines.stat().st_size)
        return preparation(lines, *others)

    monkeypatch.setattr(data, "preparation", look)
    assert benchmark.main(["data", "--json", str(record), *options]) == 0
    figures = json.loads(record.read_text())
    assert figures["benchmark"] == "data"
    assert figures["encode: share of sentencepiece"] == pytest.approx(
        figures["encode: worker MB/s"] / figures["encode: sentencepiece batch MB/s"]
    )
    for name in ("read: lines MB/s", "read: pyarrow JSON MB/s", "prepare: 12 files, s"):
        assert figures[name] > 0
    assert figures["prepare: MB of the largest process"] > 50
    assert sizes[0] > 1_500_000, "the text that was asked for, not what encoding is measured on"


def test_other_options_go_to_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(data, "main", lambda argv: given.append(argv) or 7)
    assert benchmark.main(["data", "--workers", "3", "--json", "x"]) == 7
    assert given == [["--json", "x", "--workers", "3"]]
    with pytest.raises(SystemExit):
        benchmark.main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
