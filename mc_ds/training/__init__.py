"""Training: the DeepSpeed engine, replicated LensNet, the loop, checkpoints and telemetry.
`loop.train` is the entry.
"""
