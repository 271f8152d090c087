"""The one error a user's configuration mistake raises, the base of all config models, and errors
as single lines.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MAX_MISTAKES = 3
"""Mistakes named in one line; more are counted."""


MAX_CHARACTERS = 2_000
"""Of an error's line: what it quotes may be as long as a file."""


class ConfigError(ValueError):
    """A setting that cannot work: what was wrong, the value, what would be right, in one line.

    Characters that are not printable, such as line breaks in a name, are shown as escapes.
    """

    def __init__(self, line: str) -> None:
        half = MAX_CHARACTERS // 2
        shown = line if len(line) <= MAX_CHARACTERS else f"{line[:half]} ... {line[-half:]}"
        super().__init__("".join(map(_printable, shown)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


class Settings(BaseModel):
    """Base of every config section: unknown keys are refused, the docstring below a field is its
    documentation.
    """

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        frozen=True,
        allow_inf_nan=False,
    )


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every field of `model` by its dotted path (`mc.block_size`), the sections themselves
    (`mc`) included.
    """
    paths: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        paths[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid dotted name closest to `name`: by its last part in whatever section, else as a
    whole; None where none is close.
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
    """The error for a key that does not exist: names the nearest one. `option_prefix` is "--" on
    a command line.
    """
    match = nearest(name, valid)
    hint = f"did you mean {option_prefix}{match}?" if match else "--help lists every field"
    return ConfigError(f"{source}{': ' if source else ''}unknown key {option_prefix}{name}: {hint}")


def validation_error(
    error: ValidationError, model: type[BaseModel], *, source: str = ""
) -> ConfigError:
    """One line for pydantic's report: per mistake the field's path, the value and what would be
    right.

    `source` (the recipe's path) introduces unknown keys, which can come from nowhere else.
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
