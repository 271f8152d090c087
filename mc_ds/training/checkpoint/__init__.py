"""Checkpoints of engine, LensNet and trainer.

A checkpoint is a folder `checkpoints/step_00000123/` with DeepSpeed's shards, `lens.pt` (LensNet,
its optimizer, its statistics), `trainer.json` (step, counters, sharding, and the settings that a
resuming config must share) and `manifest.json` (size and SHA-256 of every file). It is written to a
staging folder and published by a rename. The file `latest` has the name of the newest, for people
and other tools; the trainer uses only manifests.
"""

from mc_ds.training.checkpoint.find import find_checkpoint
from mc_ds.training.checkpoint.load import ResumePlan, Sharding, load_checkpoint, plan_resume
from mc_ds.training.checkpoint.save import CheckpointSaver
from mc_ds.weights.checkpoint.folder import checkpoint_name, checkpoint_step, list_checkpoints

__all__ = [
    "CheckpointSaver",
    "ResumePlan",
    "Sharding",
    "checkpoint_name",
    "checkpoint_step",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "plan_resume",
]
