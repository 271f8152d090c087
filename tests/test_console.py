"""Programs outlive characters that their output cannot encode, and end with 130 after Ctrl-C."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mc_ds.console import HelpFormatter
from tests.support.processes import ROOT, bare
from tests.support.tiny_run import TIMEOUT_S

PROGRAMS = sorted(
    path
    for folder in ("launch", "tools", "tools/bench")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def start(main: str, tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a program whose `main` has this body."""
    program = tmp_path / "program.py"
    program.write_text(
        f"from mc_ds.console import run_program\ndef main(argv):\n    {main}\nrun_program(main)\n"
    )
    return subprocess.run(
        [sys.executable, program],
        env=bare(environ),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_what_cannot_be_shown_is_replaced(tmp_path: Path) -> None:
    done = start("print('caf\u00e9 \u6a21 end'); return 7", tmp_path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"caf\xe9 ? end\n", b"")


def test_an_interrupt_is_one_line_and_130(tmp_path: Path) -> None:
    done = start("raise KeyboardInterrupt", tmp_path)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_with_native_threads_all_but_the_interpreter_is_ended(tmp_path: Path) -> None:
    body = (
        "import atexit, sys, threading, time; from mc_ds.console import has_native_threads; "
        "has_native_threads(); atexit.register(print, 'handler'); "
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start(); "
        "sys.modules['kept'] = type('Kept', (), {'__del__': lambda self: print('finalized')})(); "
        "sys.stdout.write('no end of line'); return 7"
    )
    done = start(body, tmp_path)
    assert (done.returncode, done.stderr) == (7, b"")
    assert done.stdout == b"no end of linethread\nhandler\n"


def test_output_that_nobody_reads_ends_a_program_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from mc_ds.console import run_program\n"
        "def main(argv):\n    while True: print('line')\nrun_program(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, program],
        env=bare({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_begins_and_ends_this_way(path: Path) -> None:
    last = ast.unparse(ast.parse(path.read_text()).body[-1])
    assert last == "if __name__ == '__main__':\n    run_program(main)"


def test_help_names_defaults_and_keeps_the_lines_of_the_description() -> None:
    parser = argparse.ArgumentParser(description="a\n  b", formatter_class=HelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5, help="how fast")
    parser.add_argument("--told", default=3, help="how often; default: as often as it takes")
    parser.add_argument("--no_value", action="store_true", help="whether")
    parser.add_argument("--none", help="nothing by default of argparse")
    parser.add_argument("--empty", default="", help="some")
    said = parser.format_help()
    assert "a\n  b" in said
    assert "how fast (default: 0.5)" in said
    assert said.count("(default:") == 1


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_shows_its_help_in_this_form(path: Path) -> None:
    source = path.read_text()
    assert "ArgumentParser(" not in source or "formatter_class=HelpFormatter" in source
