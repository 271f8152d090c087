"""Removes machine-specific paths from a config, so that it can be published with a model."""

import os
from typing import Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from mc_ds.config.run import RunConfig

Section = TypeVar("Section", bound=BaseModel)


def without_paths(config: RunConfig, *, own: str) -> RunConfig:
    """Return the config with every path reset to its default.

    If set, `data.tokenizer` and `train.init_from` become `own` instead: the folder that will
    contain tokenizer and weights.
    """
    cleared = _cleared(config)
    data, train = cleared.data, cleared.train
    if config.data.tokenizer is not None:
        data = data.model_copy(update={"tokenizer": own})
    if config.data.datasets:  # users must name a folder of text, as for the corpus `files`
        data = data.model_copy(update={"source": "files"})
    if config.train.init_from is not None:
        train = train.model_copy(update={"init_from": own})
    return cleared.model_copy(update={"data": data, "train": train})


def is_path(field: FieldInfo) -> bool:
    """Return whether a setting is a path or contains paths."""
    return any(
        isinstance(mark, AfterValidator) and mark.func is os.path.expanduser
        for mark in (*field.metadata, *_marks(field.annotation))
    )


def _marks(annotation: Any) -> list[Any]:
    """Return the `Annotated` metadata of a type and of its type arguments."""
    below = [mark for part in get_args(annotation) for mark in _marks(part)]
    return [*getattr(annotation, "__metadata__", ()), *below]


def _has_paths(part: object) -> bool:
    return isinstance(part, BaseModel) and any(map(is_path, type(part).model_fields.values()))


def _cleared(section: Section) -> Section:
    changes: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            changes[name] = _cleared(value)
        elif is_path(field) or (value and isinstance(value, list) and _has_paths(value[0])):
            changes[name] = field.get_default(call_default_factory=True)
    return section.model_copy(update=changes)
