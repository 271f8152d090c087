"""The DeepSpeed engine: its config, its construction, and initial weights."""
