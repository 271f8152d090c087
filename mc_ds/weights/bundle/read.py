"""Read bundles. Every file is checked before it is used; weights are memory-mapped and read one at
a time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.config.portable import without_paths
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.storage import (
    MANIFEST,
    damage,
    fingerprint,
    read_json,
    read_json_bytes,
    reason,
    recover,
)
from mc_ds.weights.bundle.manifest import (
    REMEDY,
    BundleManifest,
    read_bundle_manifest,
    tokenizer_of,
)
from mc_ds.weights.layout import CONFIG, DTYPES, EMBEDDING
from mc_ds.weights.safetensors_file import open_tensors, shape_of
from mc_ds.weights.weights import Weights


def is_bundle(path: str | Path) -> bool:
    """Return whether a folder has the manifest of a bundle. Does not check its files; `open_bundle`
    does.
    """
    recover(Path(path))
    try:
        content = json.loads(read_json_bytes(Path(path) / MANIFEST, follow=True))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "parameters"} <= content.keys()


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
    manifest, content = read_bundle_manifest(path)
    if problem := damage(path, read=verify):
        raise ConfigError(f"bundle {path} is damaged: {problem}: make it again")
    _check_headers(path, manifest)
    return Bundle(path, _read_config(path, manifest), manifest, content)


def _read_config(path: Path, manifest: BundleManifest) -> RunConfig:
    """Return the run's config, without its paths, which are not valid on this machine."""
    content = read_json(path / CONFIG, remedy=REMEDY)
    try:
        config = RunConfig.model_validate(content["run"])
    except ValidationError as error:
        raise validation_error(error, RunConfig, source=str(path / CONFIG)) from None
    except KeyError as error:
        raise ConfigError(f"{path / CONFIG} is damaged ({reason(error)}): {REMEDY}") from None
    rows, size = manifest.parameters.get(EMBEDDING), manifest.tokenizer.vocab_size
    if content.get("vocab_size") != size or rows is None or rows.shape[:1] != [size]:
        raise ConfigError(
            f"bundle {path} is damaged: vocab_size = {content.get('vocab_size')!r} in {CONFIG}, but"
            f" its tokenizer has {size} pieces, and its embedding the shape"
            f" {None if rows is None else rows.shape}: {REMEDY}"
        )
    return without_paths(config, own=str(path))


def _check_headers(path: Path, manifest: BundleManifest) -> None:
    """Raise ConfigError if a file does not hold the tensors listed in the manifest."""
    by_file: dict[str, list[str]] = {}
    for name, entry in manifest.parameters.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        with open_tensors(path / file, remedy=REMEDY) as shard:
            present = set(shard.keys())
            for name in names:
                entry = manifest.parameters[name]
                if name not in present or shape_of(shard, name) != tuple(entry.shape):
                    raise ConfigError(
                        f"bundle {path} is damaged: {name} in {file} does not match the manifest:"
                        f" {REMEDY}"
                    )


class Bundle(Weights):
    """An opened bundle with memory-mapped weights."""

    def __init__(
        self, path: Path, config: RunConfig, manifest: BundleManifest, content: dict[str, Any]
    ) -> None:
        super().__init__(
            path,
            config,
            title=manifest.source,
            step=manifest.step,
            parameters={name: tuple(entry.shape) for name, entry in manifest.parameters.items()},
            tied=manifest.tied,
            corpus_fingerprint=manifest.corpus,
        )
        self._facts, self.manifest = manifest, content
        self.gistnet_hash = manifest.hashes.gistnet
        """SHA-256 of the weights and settings that determine a tree's gists: embedding, GistNet."""
        self.lensnet_hash = manifest.hashes.lensnet
        """SHA-256 of those that determine its index vectors: embedding and LensNet's index."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the manifest names; other tokenizer files in the folder are
        ignored.

        Raises ConfigError if it is not the one that the weights were trained with.
        """
        return tokenizer_of(self.path, self._facts.tokenizer)

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Read the parameters whose names begin with `prefix`, file by file, without tied names."""
        by_file: dict[str, list[str]] = {}
        for name, entry in self._facts.parameters.items():
            if name.startswith(prefix):
                by_file.setdefault(entry.file, []).append(name)
        for file, names in by_file.items():
            with self._open(file) as shard:
                for name in names:
                    yield name, self._checked(file, name, shard.get_tensor(name))

    def weight(self, name: str) -> Tensor:
        """Read one stored parameter. Raises KeyError for a name that is not stored."""
        file = self._facts.parameters[name].file
        with self._open(file) as shard:
            return self._checked(file, name, shard.get_tensor(name))

    def tree_hashes(self) -> tuple[str, str]:
        """Return the two hashes of `Weights.tree_hashes`, from the manifest."""
        return self.gistnet_hash, self.lensnet_hash

    def sha256(self) -> str:
        """Return the hash of the manifest."""
        return fingerprint(self.path / MANIFEST).sha256

    def versions(self) -> dict[str, str] | None:
        """Return the versions of the software that trained the weights; None if unknown."""
        return self._facts.trained_with

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        """Open a file of weights. Raises ConfigError if it cannot be read."""
        with open_tensors(self.path / file, remedy=REMEDY) as shard:
            yield shard

    def _checked(self, file: str, name: str, tensor: Tensor) -> Tensor:
        entry = self._facts.parameters[name]
        if tensor.dtype != DTYPES[entry.dtype] or list(tensor.shape) != entry.shape:
            raise ConfigError(
                f"bundle {self.path} is damaged: {name} in {file} does not match the manifest:"
                f" {REMEDY}"
            )
        return tensor
