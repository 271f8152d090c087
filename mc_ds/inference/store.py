"""Sessions on disk.

    saved/session.json    format, settings, hashes of the model, tokens of the history, where its tree is
    saved/context.npz     the working context, where one was chosen: generation goes on from it
    saved/manifest.json   sizes and hashes of these two
    saved/tree/           the tree of a session in memory; one on disk stays where it is

A save replaces a saved session and nothing else: one that fails leaves the one before.
"""

import io
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.inference.reading.contexts import Heard
from mc_ds.inference.session import Session, Settings
from mc_ds.inference.tree.disk import OWN_NAMES, DiskTree, lock_tree
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

if TYPE_CHECKING:
    from mc_ds.inference.model import InferenceModel

FORMAT = 1
SESSION, CONTEXT, TREE = "session.json", "context.npz", "tree"


def save_session(session: Session, folder: Path) -> None:
    """Writes a session; see `Session.save`."""
    _check_place(folder)
    settings = session.settings
    content = {
        "format": FORMAT,
        "settings": {**asdict(settings), "focus": settings.focus.model_dump()},
        "hashes": list(session.model.hashes),
        "tokens": len(session),
        "window": None
        if session.context is None
        else {"known": session.context.window.known, "first": session.context.window.first},
        "tree": TREE,
    }
    with StagedFolder(folder) as staged:
        if isinstance(session.tree, DiskTree):
            session.tree.commit()
            content["tree"] = str(session.tree.folder.resolve())
        else:
            _copy_tree(session, staged.path / TREE)
        files: dict[str, FileFacts] = {}
        if session.context is not None:
            files[CONTEXT] = write_bytes(staged.path / CONTEXT, _context(session))
        files[SESSION] = write_text(staged.path / SESSION, json.dumps(content, indent=1) + "\n")
        write_manifest(staged.path, files)
        with _closed_tree(folder):
            staged.publish(replaces=_check_place)


def load_session(model: "InferenceModel", folder: Path) -> Session:
    """Reads a session; see `InferenceModel.load_session`."""
    content = _read(folder)
    if content["hashes"] != list(model.hashes):
        raise ConfigError(
            f"{folder} was saved with another model: load the bundle it was made with"
        )
    inside = content["tree"] == TREE
    tree = model.open_tree(folder / TREE if inside else content["tree"])
    if len(tree) < content["tokens"]:
        found = len(tree)
        tree.close()
        raise ConfigError(
            f"the tree of {folder} has {found} tokens, {content['tokens']} were saved: restore {content['tree']} from a copy"
        )
    if inside:
        in_memory = model.open_tree("ram")
        with tree:
            tree.copy_into(in_memory)
        tree = in_memory
    settings = Settings(**content["settings"])
    session = model.make([tree], settings)[0]
    if content["window"] is not None and len(tree) == content["tokens"]:
        with np.load(folder / CONTEXT) as context:
            heard = (
                Heard(context["heard_blocks"], context["heard_scores"])
                if "heard_blocks" in context
                else None
            )
            session.restore(context["lods"], context["starts"], heard=heard, **content["window"])
    return session


def _check_place(folder: Path) -> None:
    """Raises ConfigError where something lies at `folder` that is no part of a saved session."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SESSION).exists():
        raise ConfigError(f"{folder} holds something that is no saved session: give a new folder")
    trees = (path.name for path in (folder / TREE).glob("*") if path.name.startswith(OWN_NAMES))
    if foreign := foreign_files(folder, (f"{TREE}/{name}" for name in trees)):
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which is no part of the saved session: move it away, or give a new folder"
        )


def _closed_tree(folder: Path) -> AbstractContextManager[Any]:
    """Keeps the tree inside a saved session closed while it is replaced. Raises ConfigError where it is open, in any process."""
    return lock_tree(folder / TREE) if (folder / TREE).is_dir() else nullcontext()


def _context(session: Session) -> bytes:
    """The content of context.npz."""
    assert session.context is not None
    arrays: dict[str, Any] = {"lods": session.context.lods, "starts": session.context.starts}
    if (heard := session.context.heard) is not None:
        arrays |= {"heard_blocks": heard.blocks, "heard_scores": heard.scores}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _copy_tree(session: Session, folder: Path) -> None:
    gistnet_hash, index_hash = session.model.hashes
    with DiskTree(
        folder, session.model.nets, gistnet_hash=gistnet_hash, index_hash=index_hash
    ) as copy:
        session.tree.copy_into(copy)


def _read(folder: Path) -> dict[str, Any]:
    """The checked content of session.json, its settings ready for `Settings`."""
    recover(folder)
    if (folder / SESSION).exists() and (problem := damage(folder)):
        raise ConfigError(f"the saved session {folder} is damaged: {problem}: save it again")
    try:
        content: dict[str, Any] = json.loads((folder / SESSION).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{folder} has session format {content['format']!r}, this program reads {FORMAT}: ingest it again"
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
