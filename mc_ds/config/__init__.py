"""One configuration model for everything: `RunConfig`, with `MCConfig` for all MegaContext knobs."""

from mc_ds.config.backbone import PRESETS, BackboneConfig
from mc_ds.config.errors import ConfigError
from mc_ds.config.mc import MCConfig, WCStage
from mc_ds.config.run import CheckpointConfig, DataConfig, RunConfig, TelemetryConfig, TrainConfig, ValidationConfig

__all__ = [
    "PRESETS",
    "BackboneConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "MCConfig",
    "RunConfig",
    "TelemetryConfig",
    "TrainConfig",
    "ValidationConfig",
    "WCStage",
]
