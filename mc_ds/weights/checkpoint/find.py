"""Find the checkpoint that a path refers to: one rule for resuming, evaluating, converting and
`train.init_from`.

A checkpoint given by its own path must be undamaged. For a run, the newest undamaged checkpoint is
used, and damaged newer ones are reported.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.storage import MANIFEST, damage, recover
from mc_ds.weights.checkpoint.folder import CheckpointRemovedError, all_checkpoints
from mc_ds.weights.checkpoint.trainer import TRAINER
from mc_ds.weights.layout import CONFIG
from mc_ds.weights.report import warn

REMOVED = "it is gone"
"""Result of `problem_of` for a checkpoint that its run has removed, which is not damage."""


def candidates(path: Path) -> list[Path]:
    """Return the checkpoints that `path` may refer to, newest first: itself, those in it, or those
    of its run.

    Returns none for a bundle, although it has a manifest too.
    """
    recover(path)
    is_bundle = (path / CONFIG).exists()
    if (path / TRAINER).exists() or ((path / MANIFEST).exists() and not is_bundle):
        return [path]
    return [*all_checkpoints(path), *all_checkpoints(path / "checkpoints")]


def problem_of(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return what is wrong with a checkpoint (see `storage.damage`), or None; REMOVED if its run
    has removed it meanwhile.
    """
    problem = damage(checkpoint, share, shares)
    return REMOVED if problem is not None and not checkpoint.exists() else problem


def newest_whole(
    path: Path,
    found: Sequence[Path],
    *,
    inspect: Callable[[Path], str | None] = problem_of,
    report: Callable[[str], None] = warn,
) -> Path:
    """Return the first of the `candidates` of `path` in which `inspect` finds nothing wrong.

    `report` gets one line if newer ones are skipped. Raises ConfigError for a damaged checkpoint
    given by its own path and if no checkpoint is undamaged; CheckpointRemovedError if a run that is
    still training has removed some of them.
    """
    problems: list[str] = []
    removed: list[Path] = []
    for checkpoint in found:
        problem = inspect(checkpoint)
        if problem is None:
            if problems:
                report(f"{'; '.join(problems)}: using {checkpoint.name}, the newest whole one")
            return checkpoint
        if problem == REMOVED:
            removed.append(checkpoint)
            continue
        problems.append(f"checkpoint {checkpoint} is damaged: {problem}")
        if checkpoint == path:
            raise ConfigError(f"{problems[0]}: restore it, or name another one")
    if removed:
        raise CheckpointRemovedError(removed[0])
    raise ConfigError(f"no checkpoint of {path} is whole ({'; '.join(problems)}): restore one")
