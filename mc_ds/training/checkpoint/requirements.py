"""What a config must have in common with the checkpoint it resumes: everything that shapes weights, or says which data comes next.

Learning rates, the number of steps, losses and reporting may change; so may the number of ranks, the micro-batch and the ZeRO stage. Where
a run started from (`train.init_from`) is not among it either: the weights are now the checkpoint's.
"""

from collections.abc import Mapping
from typing import Any

from mc_ds.config import ConfigError, RunConfig
from mc_ds.training.ranks.agreement import differing

MC_FIELDS = (
    *(
        "seq_len",
        "block_size",
        "max_lod",
        "position_scheme",
        "gist_dim",
        "gist_layers",
    ),
    *(
        "lens_dim",
        "lens_layers",
        "lens_heads",
        "lens_index",
        "lens_ask",
        "lens_ask_reach",
        "lens_block_scores",
    ),
)
UNSAID = {
    "mc.position_scheme": "span",
    "mc.lens_ask_reach": "tail",
    "mc.lens_block_scores": "own",
    "train.frozen": "none",
}
"""Facts that checkpoints have not always stated, and what those that do not were written with."""
FREE_BACKBONE_FIELDS = {"preset", "init_std"}


def requirements(
    config: RunConfig, *, device_type: str, tokenizer: str, data: str
) -> dict[str, Any]:
    """The facts by their dotted names. `tokenizer` and `data` identify those that are really in use."""
    backbone = config.backbone.model_dump(mode="json", exclude=FREE_BACKBONE_FIELDS)
    mc = config.mc.model_dump(mode="json", include=set(MC_FIELDS))
    return {
        **{f"backbone.{name}": value for name, value in backbone.items()},
        **{f"mc.{name}": value for name, value in mc.items()},
        "mc.num_random_variants > 0": config.mc.num_random_variants > 0,
        "train.frozen": config.train.frozen,
        "train.global_batch_size": config.train.global_batch_size,
        "train.precision": config.train.precision_on(device_type),
        "seed": config.seed,
        "tokenizer": tokenizer,
        "data": data,
    }


def require_match(checkpoint: object, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ConfigError that names every differing fact, the checkpoint's value and this run's."""
    theirs = {name: value for name, value in UNSAID.items() if name in mine} | dict(theirs)
    lines = [
        f"{key} = {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in differing(theirs, mine)
    ]
    if lines:
        raise ConfigError(
            f"{checkpoint} is of another config: {'; '.join(lines)}: use the same, or another run name, or resume = never"
        )
