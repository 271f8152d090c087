"""Reading bundles: every file is checked before it is used; weights are memory-mapped and read one
at a time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer
from mc_ds.storage import (
    MANIFEST,
    damage,
    fingerprint,
    read_json,
    read_manifest,
    reason,
    recover,
)
from mc_ds.weights.layout import CONFIG, DTYPES, FORMAT
from mc_ds.weights.weights import Weights


def is_bundle(path: str | Path) -> bool:
    """Return whether a folder has the manifest of a bundle. Whether its files are whole is checked
    by `open_bundle`.
    """
    recover(Path(path))
    try:
        content = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(content, dict) and {"format", "parameters"} <= content.keys()
    except (OSError, ValueError):
        return False


def open_bundle(path: str | Path, *, verify: bool = True) -> "Bundle":
    """Open a bundle. With `verify` all its files are read and hashed, otherwise only their sizes
    are compared.

    Raises ConfigError, in one line that names the file, for a folder that is not a bundle, has
    another format, or is damaged.
    """
    path = Path(path)
    if not is_bundle(path):
        raise ConfigError(
            f"{path} is not a bundle: give a folder made by tools/convert_checkpoint.py or"
            " tools/import_hf.py"
        )
    manifest = read_json(path / MANIFEST, remedy="make the bundle again")
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{path} has bundle format {manifest['format']!r}, this program reads format {FORMAT}:"
            " convert it again"
        )
    try:
        listed = read_manifest(path)
        needed = {CONFIG, *(str(entry["file"]) for entry in manifest["parameters"].values())}
        outside = [name for name in listed.keys() | needed if Path(name).name != name]
        unlisted = sorted(needed - listed.keys())
        (
            int(manifest["step"]),
            str(manifest["source"]),
            manifest["hashes"]["gistnet"],
            manifest["hashes"]["lensnet"],
            manifest["tied"].items(),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path / MANIFEST} is damaged ({reason(error)}): make the bundle again"
        ) from None
    if outside or unlisted:
        raise ConfigError(
            f"{path / MANIFEST} is damaged: its files do not include {(outside or unlisted)[0]}:"
            " make the bundle again"
        )
    if problem := damage(path, read=verify):
        raise ConfigError(f"bundle {path} is damaged: {problem}: make it again")
    content = read_json(path / CONFIG, remedy="make the bundle again")
    try:
        config = RunConfig.model_validate(content["run"])
        vocab_size = int(content["vocab_size"])
    except ValidationError as error:
        raise validation_error(error, RunConfig, source=str(path / CONFIG)) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path / CONFIG} is damaged ({reason(error)}): make the bundle again"
        ) from None
    return Bundle(path, config, vocab_size, manifest)


class Bundle(Weights):
    """An opened bundle; weights are memory-mapped."""

    def __init__(
        self, path: Path, config: RunConfig, vocab_size: int, manifest: dict[str, Any]
    ) -> None:
        super().__init__(
            path,
            config,
            title=manifest["source"],
            step=manifest["step"],
            parameters={
                name: tuple(entry["shape"]) for name, entry in manifest["parameters"].items()
            },
            tied=manifest["tied"],
            corpus_fingerprint=manifest.get("corpus"),
        )
        self._vocab_size, self.manifest = vocab_size, manifest
        self.gistnet_hash: str = manifest["hashes"]["gistnet"]
        """SHA-256 over the weights and settings that decide a tree's gists: embedding and GistNet.
        """
        self.lensnet_hash: str = manifest["hashes"]["lensnet"]
        """SHA-256 over those that decide a tree's index vectors: embedding and LensNet's index."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the bundle."""
        return load_tokenizer(self.path)

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Read the parameters whose name begins with `prefix`, file by file; tied names are left
        out."""
        by_file: dict[str, list[str]] = {}
        for name, entry in self.manifest["parameters"].items():
            if name.startswith(prefix):
                by_file.setdefault(entry["file"], []).append(name)
        for file, names in by_file.items():
            with self._open(file) as shard:
                for name in names:
                    yield name, self._checked(file, name, shard.get_tensor(name))

    def weight(self, name: str) -> Tensor:
        """Read one stored parameter. Raises KeyError for a name that is not stored."""
        file = self.manifest["parameters"][name]["file"]
        with self._open(file) as shard:
            return self._checked(file, name, shard.get_tensor(name))

    def tree_hashes(self) -> tuple[str, str]:
        """Return the hashes of what decides a tree's gists, and its index vectors, as the manifest
        has them."""
        return self.gistnet_hash, self.lensnet_hash

    def sha256(self) -> str:
        """Return the hash of the manifest."""
        return fingerprint(self.path / MANIFEST).sha256

    def versions(self) -> dict[str, str] | None:
        """Return the versions of the software that made the weights."""
        return self.manifest.get("trained_with")

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        """Open a file of weights. Raises ConfigError where it cannot be read."""
        try:
            with safe_open(self.path / file, framework="pt") as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"bundle {self.path} is damaged: {file}: {reason(error)}: make it again"
            ) from None

    def _checked(self, file: str, name: str, tensor: Tensor) -> Tensor:
        entry = self.manifest["parameters"][name]
        if tensor.dtype != DTYPES.get(entry["dtype"]) or list(tensor.shape) != entry["shape"]:
            raise ConfigError(
                f"bundle {self.path} is damaged: {name} in {file} does not match its manifest: make"
                " it again"
            )
        return tensor
