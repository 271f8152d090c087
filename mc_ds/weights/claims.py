"""Compare the sizes in a config with the parameters in the files before any module is built: a
config that asks for 10^18 layers would never finish building, even without memory.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.weights.layout import EMBEDDING

REMEDY = "use the config.json that belongs to these weights"


def blocks_in(names: Collection[str], prefix: str) -> int:
    """Return the number of blocks among parameter names of the form `{prefix}{block
    number}.{rest}`.
    """
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{1,9}})\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def check_claims(path: Path, config: RunConfig, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError if the config of opened weights has other numbers of blocks, or another
    width, than their parameters.
    """
    has_variants = config.mc.num_random_variants > 0
    for setting, claimed, prefix in (
        ("backbone.num_layers", config.backbone.num_layers, "backbone.blocks."),
        ("mc.gist_layers", config.mc.gist_layers * has_variants, "gistnet.blocks."),
        ("mc.lens_layers", config.mc.lens_layers * has_variants, "lensnet.blocks."),
    ):
        found = blocks_in(parameters, prefix)
        if claimed != found:
            raise ConfigError(
                f"{path}: {setting} = {claimed}, but its files have {found}: {REMEDY}"
            )
    shape = parameters.get(EMBEDDING)
    if shape is None or len(shape) != 2 or shape[1] != config.backbone.dim:
        raise ConfigError(
            f"{path}: backbone.dim = {config.backbone.dim}, but its files have"
            f" {'no embedding' if shape is None else f'an embedding of shape {list(shape)}'}:"
            f" {REMEDY}"
        )


def require_finite(source: object, name: str, tensor: Tensor) -> None:
    """Raise ConfigError for a parameter with a non-finite value, which would make all results
    NaN.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{source}: {name} holds values that are not finite: use other weights")
