"""Sessions on disk.

    saved/session.json    format, settings, hashes of the model, tokens of the history, its tree
    saved/context.npz     the working context, where one was chosen: generation goes on from it
    saved/tree/           the tree of a session in memory; one on disk stays where it is

A folder is written beside its name and renamed when it is complete, so that a save that fails
leaves the one before.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.inference.reading.contexts import Context
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import reason, sync_folder, write_text

FORMAT = 2
SESSION, CONTEXT, TREE = "session.json", "context.npz", "tree"


@dataclass(frozen=True)
class SavedSession:
    """What a folder holds of a session."""

    settings: Settings
    hashes: tuple[str, str]
    """Of the model's weights."""
    tokens: int
    """Of the history."""
    tree: Path
    """Folder of its tree."""
    tree_inside: bool
    """Whether that is part of the saved session: the copy of a tree in memory."""
    arrays: dict[str, Any]
    """`lods`, `starts` and perhaps `rescored` of its context; empty where none was chosen."""
    known: int
    """Tokens of the context's window."""
    first: int
    """Tokens left out at the window's beginning."""


def save_session(
    folder: Path,
    tree: MegaContextTree,
    settings: Settings,
    *,
    context: Context | None,
    hashes: tuple[str, str],
) -> None:
    """Writes a session; see `Session.save`."""
    if (
        folder.exists()
        and not (folder / SESSION).exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ConfigError(f"{folder} holds something that is no saved session: give a new folder")
    content = {
        "format": FORMAT,
        "settings": {**asdict(settings), "focus": settings.focus.model_dump()},
        "hashes": list(hashes),
        "tokens": len(tree),
        "window": None
        if context is None
        else {"known": context.window.known, "first": context.window.first},
        "tree": TREE,
    }
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if isinstance(tree, DiskTree):
            tree.commit()
            content["tree"] = str(tree.folder.resolve())
        else:
            with DiskTree(
                new / TREE, tree.nets, gistnet_hash=hashes[0], index_hash=hashes[1]
            ) as copy:
                tree.copy_into(copy)
        if context is not None:
            with (new / CONTEXT).open("wb") as file:
                arrays: dict[str, Any] = {"lods": context.lods, "starts": context.starts}
                if context.rescored is not None:
                    arrays["rescored"] = context.rescored
                np.savez(file, **arrays)
        write_text(new / SESSION, json.dumps(content, indent=1) + "\n")
        sync_folder(new)
        if folder.exists():
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
        sync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_session(folder: Path) -> SavedSession:
    """What `save_session` wrote. Raises ConfigError where there is none."""
    content = _read(folder)
    arrays: dict[str, Any] = {}
    if content["window"] is not None:
        with np.load(folder / CONTEXT) as context:
            arrays = {name: context[name] for name in context.files}
    return SavedSession(
        settings=Settings(**content["settings"]),
        hashes=(content["hashes"][0], content["hashes"][1]),
        tokens=content["tokens"],
        tree=folder / content["tree"],  # an absolute path stays as it is
        tree_inside=content["tree"] == TREE,
        arrays=arrays,
        **(content["window"] or {"known": 0, "first": 0}),
    )


def _read(folder: Path) -> dict[str, Any]:
    """The checked content of session.json, its settings ready for `Settings`."""
    try:
        content: dict[str, Any] = json.loads((folder / SESSION).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{folder} has session format {content['format']!r}, this program reads {FORMAT}: "
                f"ingest it again"
            )
        settings = content["settings"]
        settings["focus"] = FocusConfig.model_validate(settings["focus"])
        for name in ("seed", "tail"):
            settings[name] = None if settings[name] is None else tuple(settings[name])
        Settings(**settings)
        content["hashes"], content["tree"], content["window"], int(content["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{folder} is no saved session ({reason(error)}): give a folder that Session.save wrote"
        ) from None
    return content
