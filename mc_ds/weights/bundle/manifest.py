"""The validated content of a bundle's `manifest.json`: guarantees later code that all fields exist
with the right types.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from mc_ds.config import ConfigError
from mc_ds.config.errors import validation_error
from mc_ds.data.tokenizer import KINDS, Tokenizer
from mc_ds.storage import MANIFEST, read_json, read_manifest
from mc_ds.weights.layout import CONFIG, FORMAT, DtypeName

REMEDY = "make the bundle again"


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StoredParameter(_Facts):
    """One parameter, and the file that contains it."""

    shape: list[PositiveInt]
    dtype: DtypeName
    file: str


class TokenizerFacts(_Facts):
    """The tokenizer's file."""

    file: str
    vocab_size: PositiveInt
    sha256: str


class Hashes(_Facts):
    """Digests of everything that determines a tree's gists and index vectors."""

    gistnet: str
    lensnet: str


class BundleManifest(_Facts):
    """The manifest, except its list of files."""

    format: Literal[1]
    step: NonNegativeInt
    source: str
    dtype: Literal["fp32", "bf16", "mixed"]
    hashes: Hashes
    tokenizer: TokenizerFacts
    parameters: dict[str, StoredParameter]
    tied: dict[str, str]
    corpus: str | None = None
    trained_with: dict[str, str] | None = None
    notes: dict[str, str] | None = None


def read_bundle_manifest(folder: Path) -> tuple[BundleManifest, dict[str, Any]]:
    """Return the manifest, both validated and as plain JSON.

    Raises ConfigError, in one line, for another format and for a manifest that is damaged or refers
    to files that it does not list.
    """
    content = read_json(folder / MANIFEST, remedy=REMEDY)
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{folder} has bundle format {content.get('format')!r}, but this version reads format"
            f" {FORMAT}: convert it again"
        )
    try:
        manifest = BundleManifest.model_validate(content)
        listed = read_manifest(folder).keys()
    except ValidationError as error:
        line = validation_error(error, BundleManifest)
        raise ConfigError(f"{folder / MANIFEST} is damaged: {line}: {REMEDY}") from None
    except ValueError as error:
        raise ConfigError(f"bundle {folder}: {error}: {REMEDY}") from None
    needed = {
        CONFIG,
        manifest.tokenizer.file,
        *(parameter.file for parameter in manifest.parameters.values()),
    }
    outside = sorted(name for name in listed | needed if Path(name).name != name)
    if missing := outside or sorted(needed - listed):
        raise ConfigError(
            f"{folder / MANIFEST} is damaged: its list of files lacks {missing[0]}: {REMEDY}"
        )
    if manifest.tokenizer.file not in {kind.file_name for kind in KINDS}:
        raise ConfigError(
            f"{folder / MANIFEST} is damaged: {manifest.tokenizer.file} is not a tokenizer:"
            f" {REMEDY}"
        )
    return manifest, content


def tokenizer_of(folder: Path, facts: TokenizerFacts) -> Tokenizer:
    """Load the tokenizer of a bundle. Raises ConfigError if it differs from the manifest."""
    kind = next(kind for kind in KINDS if kind.file_name == facts.file)
    tokenizer = kind.load(folder / facts.file)
    if (tokenizer.sha256, tokenizer.vocab_size) != (facts.sha256, facts.vocab_size):
        raise ConfigError(
            f"bundle {folder} is damaged: {facts.file} has {tokenizer.vocab_size} pieces and"
            f" SHA-256 {tokenizer.sha256}, but {facts.vocab_size} and {facts.sha256} in the"
            f" manifest: {REMEDY}"
        )
    return tokenizer
