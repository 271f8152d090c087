"""Python started with -O leaves assertions out: nothing that a program needs to happen stands in
one.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("mc_ds", "launch", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PURE = {"all", "any", "isinstance", "issubclass", "len", "max", "min", "set", "sorted"}
PURE_METHODS = {"dim", "is_autocast_cache_enabled", "is_autocast_enabled", "keys", "numel", "size"}
"""What an assertion may call: functions that only look."""


def work_in_assertions(source: str) -> list[str]:
    """What assertions do beside looking, as code."""
    return [
        f"line {part.lineno}: {ast.unparse(part)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
        for part in ast.walk(node)
        if isinstance(part, ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr)
        or (isinstance(part, ast.Call) and not is_pure(part.func))
    ]


def is_pure(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in PURE
    return isinstance(function, ast.Attribute) and function.attr in PURE_METHODS


@pytest.mark.parametrize(
    "source",
    [
        "assert shard.add(name, tensor), 'no room'",
        "assert ready, tell()",
        "assert (found := look)",
        "assert functions[0](1)",
        "async def f():\n    assert await g",
    ],
)
def test_work_is_seen(source: str) -> None:
    assert work_in_assertions(source)


def test_looking_is_no_work() -> None:
    assert not work_in_assertions("assert isinstance(a, B) and len(a) == a.b[0].numel(), f'{a}'")


def test_assertions_only_look() -> None:
    found = {path: work_in_assertions(path.read_text()) for path in FILES}
    assert not {path.name: work for path, work in found.items() if work}
