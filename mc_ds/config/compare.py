"""Flattens settings to dotted names, and compares two sets of them."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of `dotted.name: value`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ or that one side lacks; keys of `mine` come first."""
    return [
        key
        for key in dict.fromkeys([*mine, *theirs])
        if key not in mine or key not in theirs or mine[key] != theirs[key]
    ]
