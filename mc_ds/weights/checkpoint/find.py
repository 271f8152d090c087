"""Which checkpoint a path means: one rule for resuming, evaluating, converting and
`train.init_from`.

A checkpoint that the path names itself must be whole. Of a run the newest whole checkpoint is
taken, and newer ones that are damaged are reported.
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
"""What `problem_of` returns for a checkpoint that its run removed: nothing is damaged."""


def candidates(path: Path) -> list[Path]:
    """List the checkpoints that `path` may mean, newest first: itself, those in it, or those of its
    run.

    A bundle, which has a manifest too, gives none.
    """
    recover(path)
    is_bundle = (path / CONFIG).exists()
    if (path / TRAINER).exists() or ((path / MANIFEST).exists() and not is_bundle):
        return [path]
    return [*all_checkpoints(path), *all_checkpoints(path / "checkpoints")]


def problem_of(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return what is wrong with a checkpoint (see `storage.damage`), or None; REMOVED where its run
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

    `report` gets one line where newer ones are passed over. Raises ConfigError for a damaged
    checkpoint that `path` names itself and where no checkpoint is whole, CheckpointRemovedError
    where a run that is still training has removed some of them.
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
