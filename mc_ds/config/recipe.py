"""Recipes: strict reading of YAML files, and writing a resolved `RunConfig` as YAML."""

import re
from pathlib import Path
from typing import Any

import yaml

from mc_ds.config.errors import ConfigError
from mc_ds.config.run import RunConfig


class _RecipeLoader(yaml.SafeLoader):
    """Loads YAML 1.2's core schema: `on`, `off` and dates are strings, `1e-3` is a number.

    Duplicate keys and keys that are not strings are errors.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} should be a string", key_node.start_mark
                )
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}: keep one of them", key_node.start_mark
                )
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _RecipeDumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or the core schema would load as another type."""


_RecipeLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _schema in (_RecipeLoader, _RecipeDumper):
        _schema.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
        )


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the mapping in the YAML file at `path`, not yet validated; empty for an empty file.

    Raises ConfigError if the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"--config {path}: cannot read the recipe: {reason}; give the path of a YAML file"
        ) from error
    try:
        recipe = yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ConfigError(
            f"{path}: contains a {type(recipe).__name__}; should be a mapping of keys to values"
        )
    return recipe


def to_yaml(config: RunConfig) -> str:
    """Return every field of `config` as YAML that loads to an equal `RunConfig`."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=_RecipeDumper,
        sort_keys=False,
        allow_unicode=True,
        width=140,
    )
