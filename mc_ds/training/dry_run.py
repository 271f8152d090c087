"""`--dry_run`: reports the config, size and cost of a run without reading data, starting processes
or allocating weights.
"""

from pathlib import Path

from torch import nn

from mc_ds.config import RunConfig
from mc_ds.data import load_tokenizer
from mc_ds.model.build import build_networks
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.estimate import dry_run_report
from mc_ds.training.ranks.distributed import device_type, read_rank_environment


def dry_run(config: RunConfig) -> str:
    """Return the text of the report. Raises ConfigError where the DeepSpeed JSON contradicts the
    run, or its tokenizer cannot be read.
    """
    world_size = read_rank_environment().world_size
    device = device_type()
    ds_config = resolve_deepspeed_config(config, world_size, device)
    if config.data.tokenizer is not None:
        config = config.with_vocabulary(load_tokenizer(Path(config.data.tokenizer)).vocab_size)
    stage = ds_config["zero_optimization"]["stage"]
    return dry_run_report(config, parameter_counts(config), world_size, stage, device_type=device)


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """Return the number of parameters of each module. A tied output layer is counted with the
    embedding.
    """
    model, lensnet = build_networks(config, vocab_size=config.data.vocab_size, device="meta")
    backbone = model.backbone
    counts = {
        "embedding": _count(backbone.embedding),
        "decoder blocks": _count(backbone.blocks) + _count(backbone.norm),
    }
    if not config.backbone.tie_embeddings:
        counts["head"] = _count(backbone.head)
    if model.gistnet is not None and lensnet is not None:
        counts |= {"gistnet": _count(model.gistnet), "lensnet": _count(lensnet)}
    return counts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
