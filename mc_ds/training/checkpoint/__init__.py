"""Checkpoints of engine, LensNet and trainer: staged, listed in a manifest of hashes, published
whole; found, verified and resized.

A checkpoint is a folder `checkpoints/step_00000123/` with DeepSpeed's shards, `lens.pt`
(LensNet, its optimizer, its statistics), `trainer.json` (step, counts, how the run was sharded,
what a resuming config must agree with) and `manifest.json` (size and SHA-256 of every file).
`latest` names the newest, for people and tools: the trainer itself trusts manifests only.
"""

from mc_ds.training.checkpoint.find import find_checkpoint
from mc_ds.training.checkpoint.load import ResumePlan, Sharding, load_checkpoint, plan_resume
from mc_ds.training.checkpoint.save import save_checkpoint
from mc_ds.weights.checkpoint.folder import checkpoint_name, list_checkpoints

__all__ = [
    "ResumePlan",
    "Sharding",
    "checkpoint_name",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "plan_resume",
    "save_checkpoint",
]
