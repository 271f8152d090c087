"""Setting aside what a start would lose: a new beginning in a run's folder removes nothing."""

import shutil
from pathlib import Path

from mc_ds.storage import replace_text
from mc_ds.training.telemetry.wandb_mirror import ID_FILE
from mc_ds.weights.checkpoint.folder import all_checkpoints

RECORD = ("metrics.jsonl", "bad_steps", ID_FILE, "config.yaml")
"""What a run writes beside its checkpoints."""


def set_aside(folder: Path, upto: Path | None, *, config: str) -> Path | None:
    """Move what a run that goes on from `upto` would lose to `before_N` in its folder, and return
    that; None where nothing would be lost.

    `upto` is the run's own checkpoint that it goes on from; None: it begins anew, or elsewhere.
    Checkpoints beyond it are moved; the record and the config are moved too where the run begins
    anew, and copied where it goes on. `before_N` is a run's folder: its checkpoints can be
    evaluated, exported and resumed from. A record without a checkpoint is lost only if it is of
    another run than the one of `config` (the text of its config.yaml), which records the same
    again.
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
    for checkpoint in reversed(later):  # the newest last: until then it is the one to resume from
        checkpoint.rename(target / "checkpoints" / checkpoint.name)
    _name_latest(target / "checkpoints", later[0] if later else None)
    _name_latest(checkpoints, upto)
    return target


def _is_of_another_run(folder: Path, config: str) -> bool:
    """Return whether the folder has a record that a run of `config` would not write again."""
    record, described = folder / "metrics.jsonl", folder / "config.yaml"
    if not record.exists() or not record.stat().st_size:
        return False
    return not described.exists() or described.read_text(encoding="utf-8") != config


def _name_latest(checkpoints: Path, newest: Path | None) -> None:
    """Let `latest` name the newest checkpoint of a folder."""
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
