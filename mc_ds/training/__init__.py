"""Training: the DeepSpeed engine, replicated LensNet, the loop, checkpoints and telemetry.

Start reading at `loop.train`.
"""
