"""Learning rates as pure functions of the global step, so that resuming needs no scheduler state."""

import math

from mc_ds.config import MCConfig, TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of backbone and GistNet at optimizer step `step` (0-based): linear warm-up, then cosine or WSD decay."""
    return config.learning_rate * _shape(step, config.total_steps, config.warmup_steps, config)


def lens_learning_rate(step: int, start_step: int, mc: MCConfig, config: TrainConfig) -> float:
    """LensNet's rate: its own warm-up from the step at which it started, then the same decay over the rest of the run."""
    return mc.lens_lr * _shape(step - start_step, config.total_steps - start_step, mc.lens_warmup_steps, config)


def _shape(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """Share of the peak rate at `step` of `total`."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "cosine":
        progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, max(0.0, (total - step) / max(1.0, config.wsd_decay_ratio * total)))
    return ramp * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
