"""Every program with --device refuses one that is not there, in one line, before it does
anything.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import block_gains
import pytest

from launch import evaluate, generate
from tests.support.processes import ROOT
from tools.bench import infer, inference, lens, tree

BUNDLE = str(ROOT / "assets" / "recall_small")
RECIPE = str(ROOT / "launch" / "recipes" / "demo" / "demo.yaml")
Main = Callable[[Sequence[str]], int]
PROGRAMS: dict[str, tuple[Main, list[str]]] = {
    "launch/evaluate.py": (evaluate.main, ["--bundle", BUNDLE, "--policies", "recency"]),
    "launch/generate.py": (generate.main, ["--bundle", BUNDLE, "text"]),
    "tools/block_gains.py": (
        block_gains.main,
        ["measure", "--bundle", BUNDLE, "--windows", "none.npz", "--out", "out.npz"],
    ),
    "tools/bench/inference.py": (
        inference.main,
        ["--random_weights", RECIPE, "--needles", "0", "--out", "out.json"],
    ),
    "tools/bench/infer.py": (
        infer.main,
        ["--random_weights", RECIPE, "--peers", "", "--json", "out.json"],
    ),
    "tools/bench/lens.py": (lens.main, ["--config", RECIPE, "--json", "out.json"]),
    "tools/bench/tree.py": (tree.main, ["--tokens", "1000"]),
}


def test_these_are_all_programs_with_a_device() -> None:
    files = [path for folder in ("launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        if '"--device"' in path.read_text()
        or "import DTYPES, add_model_options" in path.read_text()
    }
    assert found == PROGRAMS.keys()


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_device_that_is_not_there_is_one_line(
    program: str,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main, options = PROGRAMS[program]
    assert main([*options, "--device", device]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: device = ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
