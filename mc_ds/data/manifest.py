"""The manifest of a dataset: everything that is known of it without reading its tokens."""

import json
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mc_ds.config.errors import ConfigError
from mc_ds.storage import MANIFEST, reason

FORMAT: Final = "mc_ds.dataset.v1"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


class FileEntry(BaseModel):
    """Size and hash of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class SplitFacts(BaseModel):
    """What a split holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    document_lengths: list[int]
    """Entry i counts the documents of 2**i to 2**(i + 1) - 1 tokens, separator included."""


class SourceFacts(BaseModel):
    """Where text came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """As it was given."""
    files: int
    bytes: int


class DatasetManifest(BaseModel):
    """Everything that is known of a dataset without reading its tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mc_ds.dataset.v1"]
    tokenizer_sha256: str
    vocab_size: int
    separator_id: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[SplitName, SplitFacts]
    sources: list[SourceFacts]
    skipped: dict[str, int]
    """Documents and files that were left out, by reason."""
    settings: dict[str, Any]
    """Of the preparation."""
    licence: str
    """A note for people: the licence, or licences, of the text."""
    versions: dict[str, str]
    """Of the packages that made it."""
    files: dict[str, FileEntry]


def read_manifest(path: Path) -> DatasetManifest:
    """Return the manifest of the dataset at `path`. Raises ConfigError where there is none."""
    remedy = "give a folder that tools/prepare_data.py made"
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{path / MANIFEST} has the format {content['format']!r}, should be {FORMAT!r}:"
                f" {remedy}"
            )
        return DatasetManifest.model_validate(content)
    except OSError as error:
        raise ConfigError(f"{path} is no dataset: {reason(error)}: {remedy}") from None
    except ConfigError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{path} is no dataset: {MANIFEST}: {where}: {problem['msg']}: {remedy}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path} is no dataset: damaged {MANIFEST}: {remedy}") from None
