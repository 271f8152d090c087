"""Finds the checkpoint to resume from: a named one, or the newest complete one."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.training.ranks.agreement import gather, on_main, rank_and_world
from mc_ds.weights.checkpoint.find import REMOVED, candidates, newest_whole, problem_of
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.report import warn


def find_checkpoint(resume: str, folder: Path, report: Callable[[str], None] = warn) -> Path | None:
    """Return the checkpoint that `--resume auto|never|PATH` selects, or None to start over.

    A collective. Rank 0 lists candidates, and every rank verifies its share of the files of each.
    If damaged ones are skipped, rank 0 calls `report` with a line. Raises ConfigError for an
    unusable PATH, or if all checkpoints are damaged: a run never starts over on its own.
    """
    if resume == "never":
        return None
    path = folder if resume == "auto" else Path(resume)
    found = on_main(lambda: all_checkpoints(folder) if resume == "auto" else candidates(path))
    if not found:
        if resume == "auto":
            return None
        raise ConfigError(
            f"resume = {resume} is neither a checkpoint nor a run with checkpoints: use auto,"
            " never, or such a path"
        )
    try:
        return choose_together(path, found, report)
    except ConfigError as error:
        raise ConfigError(
            f"resume = {resume}: {error}, or start over with resume = never"
        ) from error


def choose_together(
    path: Path, found: Sequence[Path], report: Callable[[str], None] = warn
) -> Path:
    """Return the newest complete checkpoint of `found`, the candidates at `path`.

    A collective; every rank verifies a share of the files.
    """
    rank, world = rank_and_world()

    def inspect(checkpoint: Path) -> str | None:
        found = [problem for problem in gather(problem_of(checkpoint, rank, world)) if problem]
        return REMOVED if REMOVED in found else next(iter(found), None)

    return newest_whole(
        path, found, inspect=inspect, report=report if rank == 0 else lambda line: None
    )
