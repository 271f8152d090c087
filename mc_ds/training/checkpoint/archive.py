"""Archives files that a start would overwrite, so that starting over deletes nothing."""

import shutil
from pathlib import Path

from mc_ds.storage import replace_text
from mc_ds.training.telemetry.screen import LOG
from mc_ds.training.telemetry.tensorboard_sink import FOLDER as TENSORBOARD
from mc_ds.training.telemetry.wandb_sink import ID_FILE
from mc_ds.weights.checkpoint.folder import all_checkpoints

RECORD = ("metrics.jsonl", LOG, "bad_steps", ID_FILE, TENSORBOARD, "config.yaml")
"""Files and folders of a run, other than checkpoints and tokenizer."""


def archive(folder: Path, upto: Path | None, *, config: str) -> Path | None:
    """Move files that a start would overwrite to the subfolder `before_N`, and return that; None if
    there are none.

    `upto` is the run's own checkpoint from which it resumes; None if it starts over or resumes from
    another run. Checkpoints after `upto` are moved. Metrics and config are moved if `upto` is None,
    else copied. `before_N` is a complete run folder, whose checkpoints can be used like any others.
    Metrics without checkpoints are archived only if the stored config differs from `config`, the
    text of this run's config.yaml; if not, this run repeats them.
    """
    checkpoints = folder / "checkpoints"
    found = all_checkpoints(checkpoints)
    later = found if upto is None else found[: found.index(checkpoints / upto.name)]
    if not later and (upto is not None or not _is_of_another_run(folder, config)):
        return None
    numbers = (folder / f"before_{number}" for number in range(1, 1 << 16))
    target = next(path for path in numbers if not path.exists())
    (target / "checkpoints").mkdir(parents=True)
    for tokenizer in folder.glob("tokenizer.*"):
        shutil.copyfile(tokenizer, target / tokenizer.name)
    for name in RECORD:
        if (folder / name).exists():
            (_move if upto is None else _copy)(folder / name, target / name)
    # Move the newest last: if this is interrupted, the run still resumes from it.
    for checkpoint in reversed(later):
        checkpoint.rename(target / "checkpoints" / checkpoint.name)
    _name_latest(target / "checkpoints", later[0] if later else None)
    _name_latest(checkpoints, upto)
    return target


def _is_of_another_run(folder: Path, config: str) -> bool:
    """Return whether the folder has metrics of a run with another config."""
    record, described = folder / "metrics.jsonl", folder / "config.yaml"
    if not record.exists() or not record.stat().st_size:
        return False
    return not described.exists() or described.read_text(encoding="utf-8") != config


def _name_latest(checkpoints: Path, newest: Path | None) -> None:
    """Write the name of a folder's newest checkpoint to its file `latest`."""
    if newest is not None:
        replace_text(checkpoints / "latest", f"{newest.name}\n")
    else:
        (checkpoints / "latest").unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    source.rename(target)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
