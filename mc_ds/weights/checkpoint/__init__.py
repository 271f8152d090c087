"""Checkpoints as files: their names, manifests and parameters, read without DeepSpeed."""
