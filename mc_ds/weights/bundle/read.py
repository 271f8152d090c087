"""Reading bundles: every file is checked before anything is made of it; weights are memory-mapped and come one at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.config.history import with_history
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.storage import MANIFEST, damage, read_json, read_manifest, reason, recover
from mc_ds.weights.bundle.layout import (
    CONFIG,
    DTYPES,
    FORMAT,
    LENSNET,
    build,
    layout_of_modules,
)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder says that it is a bundle; whether it is whole, `open_bundle` finds out."""
    recover(Path(path))
    try:
        content = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(content, dict) and {"format", "parameters"} <= content.keys()
    except (OSError, ValueError):
        return False


def open_bundle(path: str | Path, *, verify: bool = True) -> "Bundle":
    """Opens a bundle; `verify` reads and hashes all its files, else only their sizes are looked at.

    Raises ConfigError, in one line that names the file, for a folder that is no bundle, of another format, or damaged.
    """
    path = Path(path)
    if not is_bundle(path):
        raise ConfigError(
            f"{path} is no bundle: give a folder made by tools/convert_checkpoint.py or tools/import_hf.py"
        )
    manifest = read_json(path / MANIFEST, remedy="make the bundle again")
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{path} has bundle format {manifest['format']!r}, this program reads format {FORMAT}: convert it again"
        )
    try:
        listed = read_manifest(path)
        needed = {CONFIG, *(str(entry["file"]) for entry in manifest["parameters"].values())}
        outside = [name for name in listed.keys() | needed if Path(name).name != name]
        unlisted = sorted(needed - listed.keys())
        (
            int(manifest["step"]),
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
            f"{path / MANIFEST} is damaged: its files do not include {(outside or unlisted)[0]}: make the bundle again"
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


class Bundle:
    """An opened bundle."""

    def __init__(
        self, path: Path, config: RunConfig, vocab_size: int, manifest: dict[str, Any]
    ) -> None:
        self.path, self.config, self.vocab_size, self.manifest = path, config, vocab_size, manifest
        self.step: int = manifest["step"]
        self.tied: dict[str, str] = manifest["tied"]
        """Names that share another one's weights, and whose."""
        self.gistnet_hash: str = manifest["hashes"]["gistnet"]
        """SHA-256 over the weights and settings that decide a tree's gists: embedding and GistNet."""
        self.lensnet_hash: str = manifest["hashes"]["lensnet"]
        """SHA-256 over those that decide a tree's index vectors: embedding and LensNet's index."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored parameter by name."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the bundle."""
        return load_tokenizer(self.path)

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Stored parameters whose name begins with `prefix`, one at a time, memory-mapped, in their stored dtype; tied names are not.

        Tensors are valid as long as they are referenced; they must not be written to.
        """
        by_file: dict[str, list[str]] = {}
        for name, entry in self.manifest["parameters"].items():
            if name.startswith(prefix):
                by_file.setdefault(entry["file"], []).append(name)
        for file, names in by_file.items():
            with self._open(file) as shard:
                for name in names:
                    yield name, self._checked(file, name, shard.get_tensor(name))

    def weight(self, name: str) -> Tensor:
        """One stored parameter, memory-mapped. Raises KeyError for a name that is not stored."""
        file = self.manifest["parameters"][name]["file"]
        with self._open(file) as shard:
            return self._checked(file, name, shard.get_tensor(name))

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seq_len: int | None = None,
    ) -> tuple[MegaContextModel, LensNet | None]:
        """Model and LensNet on `device`, in evaluation mode; `dtype` is the model's (None: as stored, or float32 where that is mixed, as
        in a run whose backbone was frozen in bf16), LensNet's is float32.

        A bundle of a plain language model gives a model without GistNet, and no LensNet. `seq_len` is the length T of the histories that
        the model's own forward reads. Peak memory is the model and one tensor. Raises ConfigError where the weights do not fit the config.
        """
        config = self.config if seq_len is None else with_history(self.config, seq_len)
        model, lensnet = build(config, vocab_size=self.vocab_size)
        layout = layout_of_modules(model, lensnet)
        theirs, ours = self.parameters | self.tied, layout.shapes | layout.tied
        if differing := [name for name in theirs | ours if theirs.get(name) != ours.get(name)]:
            raise ConfigError(
                f"bundle {self.path}: {differing[0]} is not as {CONFIG} says: make it again with this version"
            )
        stored = {
            entry["dtype"]
            for name, entry in self.manifest["parameters"].items()
            if not name.startswith(LENSNET)
        }
        if dtype is None and len(stored) > 1:  # layers of two dtypes do not fit each other
            dtype = torch.float32
        placed: dict[str, nn.Parameter] = {}
        for name, tensor in self.weights():
            wanted = torch.float32 if name.startswith(LENSNET) else dtype
            placed[name] = nn.Parameter(tensor.to(device, wanted, copy=True), requires_grad=False)
            _place(model, lensnet, name, placed[name])
        for name, target in self.tied.items():
            _place(model, lensnet, name, placed[target])
        return model.eval(), lensnet.eval() if lensnet is not None else None

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        """A file of weights. Raises ConfigError where it cannot be read."""
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
                f"bundle {self.path} is damaged: {name} in {file} is not as its manifest says: make it again"
            )
        return tensor


def _place(model: nn.Module, lensnet: nn.Module | None, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter into the module that its full name belongs to."""
    root: nn.Module | None = model
    if name.startswith(LENSNET):
        root, name = lensnet, name.removeprefix(LENSNET)
    assert root is not None
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path).register_parameter(leaf, parameter)
