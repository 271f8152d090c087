"""Which checkpoint a path means. One rule for resuming, evaluating, converting and
`train.init_from`:

a checkpoint that is named itself must be whole; of a run the newest whole one counts, and damaged
ones that are newer are reported.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.storage import MANIFEST, damage, recover
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.checkpoint.trainer import TRAINER
from mc_ds.weights.layout import CONFIG
from mc_ds.weights.report import warn


def candidates(path: Path) -> list[Path]:
    """List the checkpoints that `path` may mean, newest first: itself, those in it, or those of its
    run.

    There are none where it is a bundle, which has a manifest too.
    """
    recover(path)
    is_bundle = (path / CONFIG).exists()
    if (path / TRAINER).exists() or ((path / MANIFEST).exists() and not is_bundle):
        return [path]
    return [*all_checkpoints(path), *all_checkpoints(path / "checkpoints")]


def newest_whole(
    path: Path,
    found: Sequence[Path],
    *,
    inspect: Callable[[Path], str | None] = damage,
    report: Callable[[str], None] = warn,
) -> Path:
    """Return the first of the `candidates` of `path` that `inspect` finds nothing wrong with.

    `report` gets one line where newer ones are passed over. Raises ConfigError for a damaged
    checkpoint that `path` names itself, and where no checkpoint is whole.
    """
    problems: list[str] = []
    for checkpoint in found:
        problem = inspect(checkpoint)
        if problem is None:
            if problems:
                report(f"{'; '.join(problems)}: using {checkpoint.name}, the newest whole one")
            return checkpoint
        problems.append(f"checkpoint {checkpoint} is damaged: {problem}")
        if checkpoint == path:
            raise ConfigError(f"{problems[0]}: restore it, or name another one")
    raise ConfigError(f"no checkpoint of {path} is whole ({'; '.join(problems)}): restore one")
