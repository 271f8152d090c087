"""Which checkpoint a run resumes from: the newest whole one, or the one that is named."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.training.ranks.agreement import gather, on_main, rank_and_world
from mc_ds.weights.checkpoint.find import REMOVED, candidates, newest_whole, problem_of
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.report import warn


def find_checkpoint(resume: str, folder: Path, report: Callable[[str], None] = warn) -> Path | None:
    """Return the checkpoint that `--resume auto|never|PATH` means, or None to start fresh.

    All ranks call it together. Rank 0 lists the candidates; every rank reads and hashes its share
    of each one's files. `report` gets one line, on rank 0, where damaged ones are passed over.
    Raises ConfigError for an unusable PATH, and where there are checkpoints but none is whole: a
    run never starts over by itself.
    """
    if resume == "never":
        return None
    path = folder if resume == "auto" else Path(resume)
    found = on_main(lambda: all_checkpoints(folder) if resume == "auto" else candidates(path))
    if not found:
        if resume == "auto":
            return None
        raise ConfigError(
            f"resume = {resume} is neither a checkpoint nor a run that has one: use auto, never, or"
            " such a path"
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
    """Return the checkpoint that `path` means. All ranks call it together, and each reads a share
    of the files.
    """
    rank, world = rank_and_world()

    def inspect(checkpoint: Path) -> str | None:
        found = [problem for problem in gather(problem_of(checkpoint, rank, world)) if problem]
        return REMOVED if REMOVED in found else next(iter(found), None)

    return newest_whole(
        path, found, inspect=inspect, report=report if rank == 0 else lambda line: None
    )
