"""Sessions on disk.

    saved/session.json    format, settings, hashes of the model, tokens of the history, its tree
    saved/context.npz     the working context, where one was chosen: generation goes on from it
    saved/manifest.json   sizes and hashes of these two
    saved/tree/           the tree of a session in memory; one on disk stays where it is

A save replaces a saved session and nothing else: one that fails leaves the one before.
"""

import io
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.inference.reading.contexts import Context
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.disk import OWN_NAMES, DiskTree, lock_tree
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import (
    FileFacts,
    StagedFolder,
    damage,
    foreign_files,
    reason,
    recover,
    write_bytes,
    write_manifest,
    write_text,
)

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
    _check_place(folder)
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
    with StagedFolder(folder) as staged:
        if isinstance(tree, DiskTree):
            tree.commit()
            content["tree"] = str(tree.folder.resolve())
        else:
            with DiskTree(
                staged.path / TREE, tree.nets, gistnet_hash=hashes[0], index_hash=hashes[1]
            ) as copy:
                tree.copy_into(copy)
        files: dict[str, FileFacts] = {}
        if context is not None:
            files[CONTEXT] = write_bytes(staged.path / CONTEXT, _arrays(context))
        files[SESSION] = write_text(staged.path / SESSION, json.dumps(content, indent=1) + "\n")
        write_manifest(staged.path, files)
        with _closed_tree(folder):
            staged.publish(replaces=_check_place)


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


def _check_place(folder: Path) -> None:
    """Raises ConfigError where something lies at `folder` that is no part of a saved session."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SESSION).exists():
        raise ConfigError(f"{folder} holds something that is no saved session: give a new folder")
    trees = (path.name for path in (folder / TREE).glob("*") if path.name.startswith(OWN_NAMES))
    if foreign := foreign_files(folder, (f"{TREE}/{name}" for name in trees)):
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which is no part of the saved session: move it away, or "
            f"give a new folder"
        )


def _closed_tree(folder: Path) -> AbstractContextManager[Any]:
    """Keeps the tree inside a saved session closed while it is replaced. Raises ConfigError where
    it is open, in any process.
    """
    return lock_tree(folder / TREE) if (folder / TREE).is_dir() else nullcontext()


def _arrays(context: Context) -> bytes:
    """The content of context.npz."""
    arrays: dict[str, Any] = {"lods": context.lods, "starts": context.starts}
    if context.rescored is not None:
        arrays["rescored"] = context.rescored
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read(folder: Path) -> dict[str, Any]:
    """The checked content of session.json, its settings ready for `Settings`."""
    recover(folder)
    if (folder / SESSION).exists() and (problem := damage(folder)):
        raise ConfigError(f"the saved session {folder} is damaged: {problem}: save it again")
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
