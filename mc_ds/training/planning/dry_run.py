"""`--dry_run`: reports the config, size and cost of a run without reading text, starting processes
or allocating weights.
"""

from pathlib import Path

from mc_ds.config import RunConfig
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.engine.preflight import known_vocabulary, with_initial_backbone
from mc_ds.training.planning.estimate import dry_run_report
from mc_ds.training.planning.work import parameter_counts
from mc_ds.training.ranks.distributed import device_type, read_rank_environment


def dry_run(config: RunConfig) -> str:
    """Return the report. Raises ConfigError if the DeepSpeed JSON contradicts the config, or if
    datasets, tokenizer or initial weights cannot be read.
    """
    config = with_initial_backbone(config, Path(config.out_dir) / config.name)
    world_size = config.ranks or read_rank_environment().world_size
    device = device_type()
    ds_config = resolve_deepspeed_config(config, world_size, device)
    if (known := known_vocabulary(config)) is not None:
        config = config.with_vocabulary(known.size)
    stage = ds_config["zero_optimization"]["stage"]
    return dry_run_report(config, parameter_counts(config), world_size, stage, device_type=device)
