"""The configuration of a run: `RunConfig`, with one section per part (`MCConfig`, `DataConfig`,
...).
"""

from mc_ds.config.backbone import PRESETS, BackboneConfig
from mc_ds.config.data import DataConfig, DatasetConfig, RecallConfig
from mc_ds.config.errors import ConfigError
from mc_ds.config.focus import FocusConfig, RetrievalConfig
from mc_ds.config.mc import MCConfig, WCStage
from mc_ds.config.run import (
    CheckpointConfig,
    CurriculumConfig,
    HealthConfig,
    RunConfig,
    TelemetryConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "PRESETS",
    "BackboneConfig",
    "CheckpointConfig",
    "ConfigError",
    "CurriculumConfig",
    "DataConfig",
    "DatasetConfig",
    "FocusConfig",
    "HealthConfig",
    "MCConfig",
    "RecallConfig",
    "RetrievalConfig",
    "RunConfig",
    "TelemetryConfig",
    "TrainConfig",
    "ValidationConfig",
    "WCStage",
]
