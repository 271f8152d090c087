"""The manifest of a dataset: counts, sources, settings and file hashes."""

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
    """Counts of one split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    document_lengths: list[int]
    """Entry i counts the documents of 2**i to 2**(i + 1) - 1 tokens, including the separator."""


class SourceFacts(BaseModel):
    """An input of the preparation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """The input as the user gave it."""
    files: int
    bytes: int


class DatasetManifest(BaseModel):
    """Content of a dataset's `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mc_ds.dataset.v1"]
    tokenizer_sha256: str
    vocab_size: int
    separator_id: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[SplitName, SplitFacts]
    sources: list[SourceFacts]
    skipped: dict[str, int]
    """Number of documents and files left out, by reason."""
    settings: dict[str, Any]
    """Settings of the preparation that affect the content."""
    licence: str
    """Licence of the text, as free text; not interpreted."""
    versions: dict[str, str]
    """Versions of the packages that made the dataset."""
    files: dict[str, FileEntry]


def read_manifest(path: Path) -> DatasetManifest:
    """Return the manifest of the dataset at `path`. Raises ConfigError if it is missing or
    invalid.
    """
    remedy = "give a folder made by tools/prepare_data.py"
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{path / MANIFEST} has the format {content['format']!r}, should be {FORMAT!r}:"
                f" {remedy}"
            )
        return DatasetManifest.model_validate(content)
    except OSError as error:
        raise ConfigError(f"{path} is not a dataset: {reason(error)}: {remedy}") from None
    except ConfigError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{path} is not a dataset: {MANIFEST}: {where}: {problem['msg']}: {remedy}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path} is not a dataset: damaged {MANIFEST}: {remedy}") from None
