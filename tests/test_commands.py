"""Commands in the documentation run: their programs exist, and the programs' own parsers accept
their arguments.
"""

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mc_ds.config.cli import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ds_configs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
"""Pages that tell a reader what to type. Those of docs/experiments tell what was typed then."""
PROGRAM = re.compile(r"(?:launch|tools)/[\w/]+\.(?:py|sbatch)")
RECIPE = "launch/recipes/demo/demo.yaml"
"""What `...` stands for in commands of the pages."""
BATCH_SCRIPTS = {
    "launch/slurm/train.sbatch": "launch/train.py",
    "launch/slurm/evaluate.sbatch": "launch/evaluate.py",
}


def commands(page: Path) -> Iterator[str]:
    """Yield the command lines of a page: in fenced and indented blocks, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}(\S.*(?:\\\n.*)*)$", text, flags=re.MULTILINE)
    for block in (*fenced, *indented):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"(?:^|\s)(?:python|deepspeed|torchrun|sbatch|srun|make) ", line):
                yield line.strip()


COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:60]}")
    for page in PAGES
    for command in commands(page)
]


@cache
def load(program: str) -> ModuleType:
    """Import a program by its path, without running it."""
    spec = importlib.util.spec_from_file_location(Path(program).stem, ROOT / program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(program: str) -> Callable[[Sequence[str]], Any]:
    """Return what parses a program's arguments: options that `parse` leaves over are settings."""
    if program == "launch/train.py":
        return load_config
    module = load(program)

    def parse(arguments: Sequence[str]) -> Any:
        parsed = module.parse(list(arguments))
        if isinstance(parsed, tuple) and program != "tools/ablate.py":
            load_config(parsed[1])
        return parsed

    return parse


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted_by_its_program(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    words = [RECIPE if word == "..." else word for word in shlex.split(command, comments=True)]
    places = [place for place, word in enumerate(words) if PROGRAM.fullmatch(word)]
    if places:
        program, *arguments = words[places[0] :]
        assert (ROOT / program).is_file()
        if program == "tools/benchmark.py":
            name, *arguments = arguments
            program = f"tools/bench/{name}.py"
        parser_of(BATCH_SCRIPTS.get(program, program))(arguments)
    else:
        assert "make" in words, f"a command of none of our programs: {command}"
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        asked = [word for word in words[words.index("make") + 1 :] if "=" not in word]
        following = asked.index("&&") if "&&" in asked else len(asked)
        assert set(asked[:following]) <= set(targets)


def test_there_are_commands_of_every_program_that_a_reader_starts() -> None:
    """The search above finds what it should."""
    found = {name for param in COMMANDS for name in PROGRAM.findall(str(param.values[0]))}
    assert {"launch/train.py", "launch/evaluate.py", "launch/generate.py"} <= found
    assert {f"tools/{name}.py" for name in ("convert_checkpoint", "import_hf", "doctor")} <= found
