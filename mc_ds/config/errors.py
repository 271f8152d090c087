"""`ConfigError`, which every mistake of a user raises; the base class of all config models; and
pydantic's errors as single lines.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MAX_MISTAKES = 3
"""Mistakes named in one line; more are counted."""


class ConfigError(ValueError):
    """A user's mistake. Its message is one line: what is wrong, the value, and what would be
    right.
    """


class Settings(BaseModel):
    """Base of every config section. Unknown keys are refused; the docstring below a field documents
    it.
    """

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        frozen=True,
        allow_inf_nan=False,
    )


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every field of `model` by its dotted path (`mc.block_size`), the sections themselves
    (`mc`) included.
    """
    paths: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        paths[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid dotted name closest to `name`, or None. Last parts are compared first, in
    any section, then whole names.
    """
    by_leaf: dict[str, list[str]] = {}
    for path in valid:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    leaf = get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.75)
    candidates = (
        by_leaf[leaf[0]] if leaf else [path for paths in by_leaf.values() for path in paths]
    )
    match = get_close_matches(name, candidates, n=1, cutoff=0.0 if leaf else 0.6)
    return match[0] if match else None


def unknown_key(
    name: str, valid: Iterable[str], *, source: str = "", option_prefix: str = ""
) -> ConfigError:
    """Return the error for a key that does not exist, naming the nearest one that does.
    `option_prefix` is "--" on a command line.
    """
    match = nearest(name, valid)
    hint = f"did you mean {option_prefix}{match}?" if match else "--help lists every field"
    return ConfigError(f"{source}{': ' if source else ''}unknown key {option_prefix}{name}: {hint}")


def validation_error(
    error: ValidationError, model: type[BaseModel], *, source: str = ""
) -> ConfigError:
    """Return pydantic's report as one line: the path, the value and what would be right, for each
    of the first MAX_MISTAKES mistakes.

    Unknown keys are prefixed with `source`, the path of the recipe: only a recipe can contain them.
    """
    valid = field_paths(model)
    lines = [_line(details, valid, source) for details in error.errors(include_url=False)]
    more = len(lines) - MAX_MISTAKES
    return ConfigError(
        "; ".join(lines[:MAX_MISTAKES]) + (f"; and {more} more mistakes" if more > 0 else "")
    )


def _line(details: ErrorDetails, valid: Iterable[str], source: str) -> str:
    path = _path(details["loc"])
    message = " ".join(details["msg"].removeprefix("Value error, ").split())
    match details["type"]:
        case "extra_forbidden":
            return str(unknown_key(path, valid, source=source))
        case "missing":
            return f"{path} is missing: give it a value"
        case "value_error":
            return f"{path}: {message}" if path else message
        case "model_type" | "model_attributes_type":
            return (
                f"{path or 'the recipe'} = {_short(details['input'])}: should be a mapping of keys"
                " to values"
            )
    return f"{path} = {_short(details['input'])}: {message[0].lower()}{message[1:]}".replace(
        ": input should", ": should", 1
    )


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in location
    ).removeprefix(".")


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
