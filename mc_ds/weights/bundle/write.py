"""Write bundles: parameters are added in any order, and the folder appears complete or not at
all.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mc_ds
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.portable import without_paths
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.storage import (
    FileFacts,
    StagedFolder,
    fingerprint,
    foreign_files,
    write_bytes,
    write_manifest,
    write_text,
)
from mc_ds.weights.bundle.card import model_card
from mc_ds.weights.bundle.read import is_bundle
from mc_ds.weights.bundle.shard import ShardFile
from mc_ds.weights.claims import require_finite
from mc_ds.weights.layout import (
    CARD,
    CONFIG,
    DTYPE_NAMES,
    DTYPES,
    FORMAT,
    LENSNET,
    DtypeName,
    layout_of,
    part_of,
    tensor_digest,
    tree_hashes,
)

MAX_SHARD_BYTES = 4 << 30
"""Size above which a part of the model continues in another file."""


class BundleWriter:
    """Writes one bundle in a staging folder, which `finish` renames to `out`. Peak memory is one
    tensor.

    As a context manager it removes a bundle that was not finished. Leftovers of killed writers are
    removed. At most one writer can write to `out` at a time.

    * `dtype` converts backbone and GistNet (None: as given), `lens_dtype` LensNet, which always
      runs in float32.
    * `corpus` is the digest of the training text.
    * `metrics` are figures for the model card, named as in `metrics.jsonl`.
    * `trained_with` holds the versions of the software that trained the weights.
    * `notes` are further facts for the model card (command, commit, hardware), each on one line.
    """

    def __init__(
        self,
        out: str | Path,
        config: RunConfig,
        tokenizer: Tokenizer,
        *,
        step: int,
        source: str,
        dtype: DtypeName | None = None,
        lens_dtype: DtypeName = "fp32",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metrics: Mapping[str, float] | None = None,
        trained_with: Mapping[str, str] | None = None,
        corpus: str | None = None,
        notes: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Raise ConfigError if `out` exists (except, with `overwrite`, a bundle without other
        files) or cannot be created.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(
                f"dtype = {dtype!r}: use fp32 or bf16, or leave it out to keep the weights' dtype"
            )
        if lens_dtype not in DTYPES:
            raise ConfigError(
                f"lens_dtype = {lens_dtype!r}: use fp32, or bf16 for a smaller bundle"
            )
        for note, text in (notes or {}).items():
            if (
                not note.strip()
                or not text.strip()
                or note.splitlines() != [note]
                or text.splitlines() != [text]
            ):
                raise ConfigError(f"note {note!r}: give a name and a text, both on one line")
        self.out = Path(os.path.abspath(out))
        self.config, self.tokenizer = without_paths(config, own="."), tokenizer
        self.step, self.source = step, source
        self.layout = layout_of(config, vocab_size=tokenizer.vocab_size)
        self._dtype, self._lens_dtype = dtype, DTYPES[lens_dtype]
        self._max_shard_bytes, self._overwrite = max_shard_bytes, overwrite
        self._metrics = dict(metrics or {})
        self._trained_with, self._notes = dict(trained_with or {}), dict(notes or {})
        self._corpus = corpus
        self._open: dict[str, ShardFile] = {}
        self._shards: dict[str, list[ShardFile]] = {}
        self._parameters: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, str] = {}
        self._check_place(self.out)
        self._staged = _stage(self.out)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one parameter, from any device. Tied parameters may be added too, if their values
        equal those of the parameter they are tied to.

        Raises ConfigError, in one line, for an unknown name, a wrong shape, a repeated name, and a
        dtype that bundles do not support.
        """
        stored = self._converted(name, tensor)
        require_finite(self.source, name, stored)
        digest = tensor_digest(stored)
        if name in self._digests:
            raise ConfigError(f"{self.source}: parameter {name} was added twice: add it once")
        self._digests[name] = digest
        if name in self.layout.tied:
            return
        dtype = DTYPE_NAMES[stored.dtype]
        shard = self._shard(part_of(name), dtype, stored.nbytes)
        if not shard.add(name, stored):  # its header is full
            self._new_shard(part_of(name), dtype).add(name, stored)
        self._parameters[name] = {"shape": list(stored.shape), "dtype": dtype}

    def finish(self) -> Path:
        """Complete the folder, flush it to disk, rename it to `out` and return its path. Raises
        ConfigError if parameters are missing, or tied ones differ.
        """
        self._check_complete()
        files = self._finish_shards()
        content = {
            "format": FORMAT,
            "run": self.config.model_dump(mode="json"),
            "vocab_size": self.tokenizer.vocab_size,
        }
        folder = self._staged.path
        files[CONFIG] = write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")
        files[self.tokenizer.file_name] = write_bytes(
            folder / self.tokenizer.file_name, self.tokenizer.content()
        )
        facts = self._facts()
        card = model_card(self.out.name, self.config, facts, self._metrics)
        files[CARD] = write_text(folder / CARD, card)
        write_manifest(folder, files, **facts)
        return self._staged.publish(replaces=self._check_place, files_are_synced=True)

    def discard(self) -> None:
        """Remove everything written. Does nothing after `finish`."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
        self._staged.discard()

    def __enter__(self) -> "BundleWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor as it is stored: contiguous, on the CPU, in its bundle dtype. Raises
        ConfigError if it does not match the layout.
        """
        expected = self.layout.shapes.get(self.layout.tied.get(name, name))
        if expected is None:
            parts = ", ".join(sorted({part_of(known) for known in self.layout.shapes}))
            raise ConfigError(
                f"{self.source}: parameter {name} is not part of this configuration, which has"
                f" other names in {parts}"
            )
        if tuple(tensor.shape) != expected:
            raise ConfigError(
                f"{self.source}: parameter {name} has shape {list(tensor.shape)}, but"
                f" {list(expected)} in this configuration"
            )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{self.source}: parameter {name} is of {tensor.dtype}: weights must be"
                " floating-point numbers"
            )
        dtype = (
            self._lens_dtype
            if name.startswith(LENSNET)
            else DTYPES[self._dtype]
            if self._dtype
            else tensor.dtype
        )
        if dtype not in DTYPE_NAMES:
            raise ConfigError(
                f"{self.source}: parameter {name} is of {dtype}, which bundles do not support: give"
                " dtype = fp32 or bf16"
            )
        return tensor.detach().to("cpu", dtype).contiguous()

    def _shard(self, part: str, dtype: DtypeName, size: int) -> ShardFile:
        """Return the file that the next tensor of `size` bytes belongs in."""
        shard = self._open.get(f"{part}.{dtype}")
        if shard is not None and (
            not shard.data_bytes or shard.data_bytes + size <= self._max_shard_bytes
        ):
            return shard
        return self._new_shard(part, dtype)

    def _new_shard(self, part: str, dtype: DtypeName) -> ShardFile:
        key = f"{part}.{dtype}"
        if key in self._open:
            self._open.pop(key).finish()
        shards = self._shards.setdefault(part, [])
        shard = ShardFile(self._staged.path / f"{part}-{len(shards) + 1:05d}.partial")
        shards.append(shard)
        self._open[key] = shard
        return shard

    def _finish_shards(self) -> dict[str, FileFacts]:
        """Complete the files and rename them, now that their number is known. Return the size and
        hash of each.
        """
        for shard in self._open.values():
            shard.finish()
        self._open.clear()
        files = {}
        for part, shards in self._shards.items():
            for number, shard in enumerate(shards, start=1):
                path = shard.path.rename(
                    shard.path.with_name(f"{part}-{number:05d}-of-{len(shards):05d}.safetensors")
                )
                files[path.name] = fingerprint(path)
                for name in shard.names:
                    self._parameters[name]["file"] = path.name
        return files

    def _check_complete(self) -> None:
        missing = [name for name in self.layout.shapes if name not in self._parameters]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ConfigError(
                f"{self.source}: {len(missing)} of {len(self.layout.shapes)} parameters are"
                f" missing: {shown}: use complete weights"
            )
        for name, target in self.layout.tied.items():
            if self._digests.get(name, self._digests[target]) != self._digests[target]:
                raise ConfigError(
                    f"{self.source}: {name} differs from {target}, although the config ties them:"
                    " set tie_embeddings = false"
                )

    def _facts(self) -> dict[str, Any]:
        """Return the manifest without its list of files."""
        dtypes = {
            entry["dtype"]
            for name, entry in self._parameters.items()
            if not name.startswith(LENSNET)
        }
        return {
            "format": FORMAT,
            "step": self.step,
            "source": self.source,
            "created_by": {"mc_ds": mc_ds.__version__, "torch": str(torch.__version__)},
            **({"trained_with": self._trained_with} if self._trained_with else {}),
            **({"notes": self._notes} if self._notes else {}),
            **({"corpus": self._corpus} if self._corpus else {}),
            "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
            "hashes": tree_hashes(
                self.config, {name: self._digests[name] for name in self._parameters}
            ),
            "tokenizer": {
                "file": self.tokenizer.file_name,
                "vocab_size": self.tokenizer.vocab_size,
                "sha256": self.tokenizer.sha256,
            },
            "parameters": {name: self._parameters[name] for name in self.layout.shapes},
            "tied": self.layout.tied,
        }

    def _check_place(self, out: Path) -> None:
        """Raise ConfigError if something that must be kept exists at `out`."""
        if not out.exists():
            return
        if not is_bundle(out):
            raise ConfigError(f"{out} exists and is not a bundle: give another name")
        if not self._overwrite:
            raise ConfigError(
                f"{out} exists: remove it, give another name, or overwrite it (--overwrite)"
            )
        if foreign := foreign_files(out):
            raise ConfigError(
                f"{out} holds {foreign[0]}, which is not part of the bundle: move it away, or give"
                " another name"
            )


def _stage(out: Path) -> StagedFolder:
    try:
        return StagedFolder(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror}: give a folder on a disk with space"
        ) from None
