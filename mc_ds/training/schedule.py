"""Learning rates as pure functions, without scheduler state."""

import math

from mc_ds.config import MCConfig, TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of backbone and GistNet at optimizer step `step` (0-based): linear
    warm-up, then cosine or WSD decay.
    """
    return config.learning_rate * (
        _ramp(step, config.warmup_steps)
        * _decay(step, config.total_steps, config.warmup_steps, config)
    )


def lens_learning_rate(
    step: int, mc: MCConfig, config: TrainConfig, *, start_step: int, steps_made: int
) -> float:
    """Return LensNet's learning rate at optimizer step `step` (0-based).

    Its warm-up counts `steps_made`, the earlier steps of LensNet's optimizer, so that skipped steps
    do not shorten it. It decays like the backbone's, from `start_step` to the run's end.
    """
    decay = _decay(step - start_step, config.total_steps - start_step, mc.lens_warmup_steps, config)
    return mc.lens_lr * (_ramp(steps_made, mc.lens_warmup_steps) * decay)


def _ramp(steps_made: int, warmup: int) -> float:
    """Return the warm-up factor, from 0 to 1, after `steps_made` steps."""
    return min(1.0, (steps_made + 1) / warmup) if warmup else 1.0


def _decay(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """Return the decay factor at `step` of `total`. Cosine decay begins after `warmup` steps."""
    if config.schedule == "cosine":
        progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, max(0.0, (total - step) / max(1.0, config.wsd_decay_ratio * total)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * share
