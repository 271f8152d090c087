"""Sessions on disk.

    saved/session.json    format, settings, hashes of the model, tokens of the history, where its tree is
    saved/context.npz     the working context, where one was chosen: generation goes on from it
    saved/tree/           the tree of a session in memory; one on disk stays where it is

A folder is written beside its name and renamed when it is complete, so that a save that fails leaves the one before.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mc_ds.config import ConfigError
from mc_ds.config.focus import FocusConfig
from mc_ds.inference.reading.contexts import Heard
from mc_ds.inference.session import Session, Settings
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.storage import reason, sync_folder, write_text

if TYPE_CHECKING:
    from mc_ds.inference.model import InferenceModel

FORMAT = 1
SESSION, CONTEXT, TREE = "session.json", "context.npz", "tree"


def save_session(session: Session, folder: Path) -> None:
    """Writes a session; see `Session.save`."""
    if (
        folder.exists()
        and not (folder / SESSION).exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ConfigError(f"{folder} holds something that is no saved session: give a new folder")
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
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if isinstance(session.tree, DiskTree):
            session.tree.commit()
            content["tree"] = str(session.tree.folder.resolve())
        else:
            _copy_tree(session, new / TREE)
        if session.context is not None:
            with (new / CONTEXT).open("wb") as file:
                arrays: dict[str, Any] = {
                    "lods": session.context.lods,
                    "starts": session.context.starts,
                }
                if (heard := session.context.heard) is not None:
                    arrays |= {"heard_blocks": heard.blocks, "heard_scores": heard.scores}
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


def _copy_tree(session: Session, folder: Path) -> None:
    gistnet_hash, index_hash = session.model.hashes
    with DiskTree(
        folder, session.model.nets, gistnet_hash=gistnet_hash, index_hash=index_hash
    ) as copy:
        session.tree.copy_into(copy)


def _read(folder: Path) -> dict[str, Any]:
    """The checked content of session.json, its settings ready for `Settings`."""
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
