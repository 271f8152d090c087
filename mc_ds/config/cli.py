"""The command line: `--config RECIPE.yaml` and a dotted override for every field of `RunConfig`.

Precedence, lowest first: defaults, backbone preset, recipe, command line. A preset given on the
command line replaces all shape keys (`dim`, `num_layers`, ...) of the recipe's backbone; the
recipe's other backbone keys stay. Environment variables are not read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from mc_ds.config.backbone import PRESETS
from mc_ds.config.errors import ConfigError, field_paths, unknown_key, validation_error
from mc_ds.config.help import full_help, short_help
from mc_ds.config.recipe import read_recipe
from mc_ds.config.run import RunConfig
from mc_ds.config.types import WAS_SWITCH

LAUNCHER_OPTIONS = frozenset({"local_rank", "local-rank"})
"""Options that launchers append; ignored, because ranks are read from the environment."""


# The two bases annotate model_config differently, which matters to a type checker only.
class CommandLine(RunConfig, BaseSettings):  # type: ignore[misc]
    """Train a MegaContext model. Every recipe key is also an option; options override the
    recipe.
    """

    config: str | None = None
    """YAML recipe; launch/recipes has examples."""


def load_config(argv: Sequence[str], prog: str = "train.py") -> RunConfig:
    """Return the validated config for `argv`, the command line without the program's name.

    Options are `--section.field=value` or `--section.field value`. Without a value, a
    boolean option is true, and so is a share that was a boolean in older versions. Lists and null
    are JSON. Raises ConfigError, a one-line message, for invalid input.
    """
    given = _parse(_canonical(argv), prog)
    path = given.pop("config", None)
    recipe = read_recipe(path) if path is not None else {}
    try:
        return RunConfig.model_validate(_override(recipe, given))
    except ValidationError as error:
        raise validation_error(error, RunConfig, source=path or "") from error


def help_text(argv: Sequence[str], prog: str = "train.py") -> str | None:
    """Return the help text that `argv` asks for, or None if it asks for none.

    `--help` gives one screen, `--help SECTION` one section in full, `--help-all` everything. Raises
    ConfigError for a section that does not exist.
    """
    for position, token in enumerate(argv):
        option, _, section = token.partition("=")
        if option == "--help-all":
            return full_help()
        if option in ("-h", "--help"):
            following = argv[position + 1 : position + 2]
            section = section or next((s for s in following if not s.startswith("-")), "")
            return full_help(section) if section else short_help(prog)
    return None


def _canonical(argv: Sequence[str]) -> list[str]:
    """Rewrite each option as one `--key=value`. Booleans, and shares that were booleans,
    get `true` if they have no value; launcher options are dropped.
    """
    fields = field_paths(CommandLine)
    options: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        key, has_value, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(
                f"unexpected argument {token!r}: options are --key=value or --key value"
            )
        if key not in fields and key not in LAUNCHER_OPTIONS:
            raise unknown_key(key, fields, option_prefix="--")
        field = fields.get(key)
        is_bool = field is not None and field.annotation is bool
        is_switch = is_bool or (field is not None and WAS_SWITCH in field.metadata)
        if not has_value:
            next_token = rest[0] if rest else "--"
            is_word = next_token.lower() in ("true", "false")
            if is_word or not (is_bool or next_token.startswith("--")):
                value = rest.pop(0)
            elif is_switch:
                value = "true"
            else:
                raise ConfigError(f"--{key} has no value: give --{key}=VALUE")
        if key not in LAUNCHER_OPTIONS:
            options.append(f"--{key}={value}")
    return options


def _parse(options: list[str], prog: str) -> dict[str, Any]:
    """Return the option values, nested by section. They may still be strings: RunConfig converts
    them.
    """
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            CommandLine,
            cli_prog_name=prog,
            cli_parse_args=options,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
        )
        return source()
    except SettingsError as error:
        what = str(error).replace(' from source "CliSettingsSource"', "")
        cause = str(error.__cause__ or "")
        detail = f": {cause}" if cause not in what else ""
        raise ConfigError(
            " ".join(f"command line: {what}{detail}; lists and sections are given as JSON".split())
        ) from error


def _override(
    recipe: Mapping[str, Any], given: Mapping[str, Any], model: type[BaseModel] = RunConfig
) -> dict[str, Any]:
    """Return `recipe` updated with `given`: sections are merged key by key, other values
    replaced.
    """
    merged = dict(recipe)
    for key, value in given.items():
        below = merged.get(key)
        section = model.model_fields[key].annotation if key in model.model_fields else None
        if (
            key == "backbone"
            and isinstance(value, dict)
            and isinstance(below, dict)
            and "preset" in value
        ):
            shape = {name for preset in PRESETS.values() for name in preset}
            below = {name: old for name, old in below.items() if name not in shape}
        if (
            isinstance(section, type)
            and issubclass(section, BaseModel)
            and isinstance(value, dict)
            and isinstance(below, dict)
        ):
            merged[key] = _override(below, value, section)
        else:
            merged[key] = value
    return merged
