"""The parameters of a config's model: parts, names, shapes and ties, and the digests of those that
a tree depends on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mc_ds.config import RunConfig
from mc_ds.model.build import build_networks
from mc_ds.weights.compatibility import tree_settings

FORMAT = 1
"""Version of the bundle format; increased when older versions would misread a bundle."""
CONFIG, CARD = "config.json", "README.md"
LENSNET = "lensnet."
"""Prefix of LensNet's parameters; those of the model begin with `backbone.` or `gistnet.`."""
EMBEDDING = "backbone.embedding.weight"
DtypeName = Literal["fp32", "bf16"]
DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}

TREE_PREFIXES = ("backbone.embedding.", "gistnet.", f"{LENSNET}index.")
"""Prefixes of the parameters from which a tree's gists and index vectors are computed."""


@dataclass(frozen=True)
class Layout:
    """The parameters of a config's model."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every stored parameter by name, in the order of the modules."""
    tied: dict[str, str]
    """Tied parameters: maps a name to the name whose weights it shares."""


def layout_of(config: RunConfig, *, vocab_size: int) -> Layout:
    """Return the layout of the model of this config."""
    return layout_of_modules(*build_networks(config, vocab_size=vocab_size, device="meta"))


def layout_of_modules(model: nn.Module, lensnet: nn.Module | None) -> Layout:
    """Return the layout of modules on any device."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if lensnet is not None:
        named |= {
            f"{LENSNET}{name}": parameter
            for name, parameter in lensnet.named_parameters(remove_duplicate=False)
        }
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    for name, parameter in named.items():
        owner = first.setdefault(id(parameter), name)
        if owner == name:
            shapes[name] = tuple(parameter.shape)
        else:
            tied[name] = owner
    return Layout(shapes, tied)


def part_of(name: str) -> str:
    """Return the part of the model (`backbone`, `gistnet`, `lensnet`) of a parameter."""
    return name.partition(".")[0]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and values of a contiguous CPU tensor."""
    digest = hashlib.sha256(f"{DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)} ".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tree_hashes(config: RunConfig, digests: Mapping[str, str]) -> dict[str, str]:
    """Return digests of everything that determines a tree's gists (`gistnet`) and its index vectors
    (`lensnet`).

    `digests` are those of the stored parameters by name. Training other parameters changes neither,
    so that trees stay valid.
    """

    def combined(settings: Mapping[str, Any], *prefixes: str) -> str:
        weights = sorted(
            (name, digest) for name, digest in digests.items() if name.startswith(prefixes)
        )
        content = [settings, weights]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    return {
        "gistnet": combined(tree_settings(config, "gists"), EMBEDDING, "gistnet."),
        "lensnet": combined(tree_settings(config, "index"), EMBEDDING, f"{LENSNET}index."),
    }
