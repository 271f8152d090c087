"""The architecture: which room may know which, and what no room may import at start.

A room is a module or package directly below `mc_ds`. Rooms are listed from the bottom to the
top, and each imports only from those before it. Every import counts: at the top of a file,
inside a function, and under `TYPE_CHECKING`.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mc_ds"

ROOMS = {
    "console": "how programs begin and end",
    "geometry": "levels of detail; knows nobody",
    "metrics": "exact reductions over micro-steps and ranks",
    "drawing": "contexts as text",
    "config": "every setting and its checks",
    "storage": "durable files and folders",
    "variants": "the training allocator",
    "data": "text to micro-batches",
    "model": "positions, backbone, GistNet, LensNet",
    "preference": "the preference loss",
    "focus": "scores to contexts; the training invariant",
    "tasks": "sequences with questions, and mixtures of them",
    "weights": "checkpoints, bundles, pretrained models",
    "inference": "trees and sessions",
    "evaluation": "policies measured on tasks",
    "training": "the loop and all that keeps it alive",
}
ORDER = list(ROOMS)


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package, and its file."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_start(path: Path) -> Iterator[str]:
    """Modules that importing a file imports at once."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def edges() -> dict[str, set[str]]:
    """Each module of the package, and the modules of the package that it imports by name."""
    known = modules()
    return {
        name: {other for other in imported(path) if other in known and other != name}
        for name, path in known.items()
    }


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_is_listed_and_there_are_at_most_18():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__", "py"} == set(ROOMS)
    assert len(ROOMS) <= 18


def test_no_folder_has_more_than_14_files():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert not {folder: count for folder, count in counts.items() if count > 14}


def test_rooms_import_only_downwards():
    upward = [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if "." in other and "." in module
        if ORDER.index(room(other)) > ORDER.index(room(module))
    ]
    assert not sorted(upward)


def test_modules_import_each_other_in_no_circle():
    """Also through type checking and local imports. A package's `__init__` only re-exports."""
    graph = {
        name: {other for other in others if modules()[other].name != "__init__.py"}
        for name, others in edges().items()
        if modules()[name].name != "__init__.py"
    }
    while free := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    assert not sorted(graph)


def test_optional_packages_are_imported_where_they_are_used():
    """At the top of a file stand the standard library and what `dependencies` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {
        re.split(r"[<>=]", entry)[0].lower().replace("-", "_") for entry in project["dependencies"]
    }
    available = required | {"yaml", "pydantic_core", "mc_ds"} | set(sys.stdlib_module_names)
    top_level = {
        (name, target.split(".")[0])
        for name, path in modules().items()
        for target in imported_at_start(path)
    }
    assert not {(name, package) for name, package in top_level if package not in available}


def test_deepspeed_is_used_in_training_alone():
    users = {
        room(name)
        for name, path in modules().items()
        if "." in name
        if any(target.split(".")[0] == "deepspeed" for target in imported(path))
    }
    assert users <= {"training"}


def test_opening_converting_evaluating_and_serving_leave_deepspeed_alone():
    """DeepSpeed takes seconds to import and may compile: what reads a model does without it."""
    programs = (
        "launch/evaluate.py",
        "launch/generate.py",
        "tools/convert_checkpoint.py",
        "tools/import_hf.py",
    )
    source = f"""
import runpy, sys
for program in {programs!r}:
    runpy.run_path(program)
    if "deepspeed" in sys.modules:
        sys.exit(f"{{program}} imports deepspeed")
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
