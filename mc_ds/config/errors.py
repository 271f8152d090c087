"""`ConfigError`, raised for every user mistake; `Settings`, the base of all config sections; and
the conversion of pydantic's reports to one-line messages.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MAX_MISTAKES = 3
"""Number of mistakes spelled out in one message; the rest are only counted."""
MAX_SUGGESTIONS = 3
"""Number of existing names suggested for an unknown one."""
MAX_CHARACTERS = 2_000
"""Length limit of a message, which may quote a value as long as a file; its middle is cut out."""


class ConfigError(ValueError):
    """A user's mistake. The message is one line: what is wrong, the value, what would be right.

    Unprintable characters, such as a line break in a name, are shown as escapes.
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
    """Base of every config section. Rejects unknown keys; the docstring below a field
    documents it.
    """

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        frozen=True,
        allow_inf_nan=False,
    )


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Map the dotted path of every field of `model` (`mc.block_size`) to the field. Sections (`mc`)
    have entries too.
    """
    paths: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        paths[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def suggestion(name: str, valid: Iterable[str], option_prefix: str = "") -> str:
    """Return "did you mean X?" with the valid dotted names closest to `name`; empty if none is
    close.

    Finds names whose last part `name` abbreviates or misspells, in any section.
    """
    paths = list(valid)
    found = _abbreviated(name, paths) or _misspelled(name, paths)
    found = found or get_close_matches(name, paths, n=1)
    return f"did you mean {' or '.join(option_prefix + path for path in found)}?" if found else ""


def _abbreviated(name: str, paths: Iterable[str]) -> list[str]:
    """Return the best matches, at most MAX_SUGGESTIONS, for `name` read as an abbreviation.

    The last part of `name` may be the initials of a field (`lr`: `learning_rate`), the end of its
    initials (`bs`: `micro_batch_size`), or some of its words (`steps`: `total_steps`); the first
    kind ranks best. All matches in the section of `name` rank above those in other sections.
    """
    section, _, short = name.rpartition(".")
    words = set(short.split("_"))
    ranked: dict[tuple[bool, int], list[str]] = {}
    for path in paths:
        there, _, leaf = path.rpartition(".")
        parts = leaf.split("_")
        initials = "".join(part[:1] for part in parts)
        if len(short) > 1 and initials.endswith(short):
            rank = int(initials != short)
        elif words <= set(parts):
            rank = 2 + len(parts) - len(words)
        else:
            continue
        ranked.setdefault((there != section, rank), []).append(path)
    return ranked[min(ranked)][:MAX_SUGGESTIONS] if ranked else []


def _misspelled(name: str, paths: Iterable[str]) -> list[str]:
    """Return a list with the path whose last part is most similar to that of `name`; empty if none
    is similar.
    """
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    leaf = get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.75)
    return get_close_matches(name, by_leaf[leaf[0]], n=1, cutoff=0.0) if leaf else []


def unknown_key(
    name: str, valid: Iterable[str], *, source: str = "", option_prefix: str = ""
) -> ConfigError:
    """Return the error for a key that does not exist, with similar names that do.

    `source` is the recipe's path, if the key came from one; `option_prefix` is "--" for options.
    """
    hint = suggestion(name, valid, option_prefix) or "--help-all lists every field"
    return ConfigError(f"{source}{': ' if source else ''}unknown key {option_prefix}{name}: {hint}")


def validation_error(
    error: ValidationError, model: type[BaseModel], *, source: str = ""
) -> ConfigError:
    """Return pydantic's report as a one-line error: path, value and what would be right, for each
    of the first MAX_MISTAKES mistakes.

    `source`, the recipe's path, is named for unknown keys: options are checked before validation.
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
