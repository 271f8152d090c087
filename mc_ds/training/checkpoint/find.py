"""Which checkpoint a run continues from: the newest one that verifies. Damaged ones are named and skipped."""

from collections.abc import Callable
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.storage import MANIFEST, damage
from mc_ds.training.ranks.agreement import broadcast, gather, rank_and_world
from mc_ds.weights.checkpoint.folder import all_checkpoints


def find_checkpoint(
    resume: str, folder: Path, report: Callable[[str], None] = print
) -> Path | None:
    """The checkpoint that `--resume auto|never|PATH` means, or None to start fresh; on all ranks together.

    Rank 0 lists the candidates; every rank reads and hashes its share of each one's files; the first without damage is it. `report` gets
    one line, on rank 0, per damaged one. Raises ConfigError for an unusable PATH, and where there are checkpoints but none is whole:
    starting over is for a person to decide.
    """
    if resume == "never":
        return None
    rank, world = rank_and_world()
    candidates = broadcast(_candidates(resume, folder))
    for candidate in candidates:
        found = [
            problem for problem in gather(damage(candidate, rank, world)) if problem is not None
        ]
        if not found:
            return candidate
        if rank == 0:
            report(f"checkpoint {candidate} is damaged and skipped: {found[0]}")
    if candidates:
        raise ConfigError(
            f"resume = {resume}: no checkpoint in {candidates[0].parent} is whole: restore one, or start over with resume = never"
        )
    if resume != "auto":
        raise ConfigError(
            f"resume = {resume} is neither a checkpoint nor a run that has one: use auto, never, or such a path"
        )
    return None


def _candidates(resume: str, folder: Path) -> list[Path]:
    """Checkpoints to try, in order."""
    if resume == "auto":
        return all_checkpoints(folder)
    path = Path(resume)
    if (path / MANIFEST).exists():
        return [path]
    return [*all_checkpoints(path), *all_checkpoints(path / "checkpoints")]
