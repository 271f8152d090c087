"""What the other tests rely on."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.optional import needs, optional
from tests.support.processes import LAUNCHERS, ROOT, bare, inherited, launcher, python_path
from tests.support.tiny_run import TIMEOUT_S, environment
from tests.test_architecture import imported


def test_processes_of_tests_keep_the_path_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment modules make packages known by PYTHONPATH: what tests start needs it as much
    as the tests.
    """
    modules = "/modules/torch:/modules/numpy"
    monkeypatch.setenv("PYTHONPATH", modules)
    assert python_path() == f"{ROOT}:{modules}"
    assert python_path(tmp_path) == f"{tmp_path}:{ROOT}:{modules}"
    assert environment(tmp_path)["PYTHONPATH"] == f"{tmp_path / 'site'}:{ROOT}:{modules}"
    assert inherited()["PYTHONPATH"] == f"{ROOT}:{modules}"
    assert bare({"A": "b"}) == {"PYTHONPATH": f"{ROOT}:{modules}", "A": "b"}
    processes.share_python_path()
    processes.share_python_path()
    assert os.environ["PYTHONPATH"] == f"{ROOT}:{modules}"
    monkeypatch.delenv("PYTHONPATH")
    assert python_path() == str(ROOT)


def test_processes_of_tests_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    variables = inherited(RANK="0")
    assert (variables["RANK"], variables["KEPT"]) == ("0", "1")
    assert not {"MASTER_PORT", "SLURM_PROCID"} & variables.keys()


def test_what_tests_start_finds_the_repository_from_any_folder(tmp_path: Path) -> None:
    """Installed or not: without `-S` the path of an installation would be there too."""
    source = "import mc_ds, os; print(os.path.dirname(os.path.dirname(mc_ds.__file__)))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == (str(ROOT), 0), done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_needs_no_script(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where packages are known by PYTHONPATH, the interpreter's folder has no scripts of them."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert launcher(name) == [str(tmp_path / "python"), "-m", LAUNCHERS[name]]
    (tmp_path / name).touch()
    assert launcher(name) == [str(tmp_path / name)]


def own_environments(source: str) -> Iterator[str]:
    """Where a test makes the environment of a process by itself, as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant | ast.keyword):
            name = node.arg if isinstance(node, ast.keyword) else node.value
            if name == "PYTHONPATH":
                yield f"line {node.lineno}: PYTHONPATH"
        if isinstance(node, ast.keyword) and (node.arg, type(node.value)) == ("env", ast.Dict):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "source",
    [
        'run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})',
        'environ |= {"PYTHONPATH": path}',
        "environ.update(PYTHONPATH=path)",
        'run(command, env={"PATH": path})',
        "run(command, env={**environ})",
    ],
)
def test_an_environment_of_its_own_is_seen(source: str) -> None:
    assert list(own_environments(source))


def test_environments_of_processes_are_made_in_one_place() -> None:
    """Whoever replaces PYTHONPATH hides the packages of a cluster's modules from what it starts."""
    allowed = {Path(__file__), ROOT / "tests/support/processes.py"}
    found = {
        path.relative_to(ROOT): list(own_environments(path.read_text()))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path not in allowed
    }
    assert not {path: lines for path, lines in found.items() if lines}


def test_what_is_not_installed_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.optional.find_spec", lambda name: None)
    reason = "plotly is not installed: pip install 'mc_ds[report]'"
    with pytest.raises(pytest.skip.Exception, match=re.escape(reason)):
        optional("plotly.graph_objects")
    assert needs("plotly").kwargs == {"reason": reason}
    assert needs("plotly").args == (True,)
    with pytest.raises(LookupError, match="numpy is in no extra"):
        optional("numpy")


def test_optional_packages_are_imported_by_optional_alone() -> None:
    """Else a test fails where an extra is not installed. What runs the tests is always there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        re.split(r"[\[<>=]", entry)[0]
        for entries in project["optional-dependencies"].values()
        for entry in entries
    } - {"mc_ds", "pytest", "hypothesis"}
    direct = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in imported(path)
        if name.partition(".")[0] in extras
    ]
    assert not direct
