"""Sessions on disk.

    saved/session.json         format, settings, hashes and tail of the model, number of tokens, its
                               tree
    saved/context.safetensors  the working context, if one was chosen; generation continues from it
    saved/manifest.json        sizes and hashes of these two files
    saved/tree/                the tree of a session in memory; a tree on disk stays where it is

Saving overwrites only a saved session. If it fails, the earlier one is unchanged.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import NonNegativeInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mc_ds.config import ConfigError, MCConfig
from mc_ds.inference.reading.contexts import Context
from mc_ds.inference.reading.saved import SavedContext
from mc_ds.inference.settings import Settings
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.folder import OWN_NAMES, lock_tree
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import (
    FileFacts,
    StagedFolder,
    damage,
    foreign_files,
    open_regular,
    read_json_bytes,
    reason,
    recover,
    write_bytes,
    write_manifest,
    write_text,
)

FORMAT = 2
SESSION, CONTEXT, TREE = "session.json", "context.safetensors", "tree"


@dataclass(frozen=True)
class SavedSession:
    """The content of a saved session's folder."""

    settings: Settings
    hashes: tuple[str, str]
    """Hashes of the model's weights."""
    tokens: int
    """Number of tokens of the history."""
    tree: Path
    """Folder of the tree."""
    tree_inside: bool
    """Whether the tree is inside the saved session: a copy of a tree in memory."""
    context: SavedContext | None
    """None if no context had been chosen."""
    tail: tuple[int, int] | None
    """`tail_of` the model; None if saved by an older version."""


@dataclass(frozen=True)
class _Window:
    known: int
    first: int


@dataclass(frozen=True)
class _Content:
    """The content of session.json."""

    format: int
    settings: Settings
    hashes: tuple[str, str]
    tokens: NonNegativeInt
    window: _Window | None
    """Window of the saved context; None without one."""
    tree: str
    tail: tuple[int, int] | None = None


_CONTENT = TypeAdapter(_Content)


def tail_of(mc: MCConfig) -> tuple[int, int]:
    """Return what a context's end depends on: `recent_tokens` and `horizon_tokens`."""
    return mc.recent_tokens, mc.horizon_tokens


def save_session(
    folder: Path,
    tree: MegaContextTree,
    settings: Settings,
    *,
    context: Context | None,
    hashes: tuple[str, str],
    tail: tuple[int, int],
) -> None:
    """Write a session to `folder`. See `Session.save`; `tail`: see `SavedSession`."""
    tree.require_open()
    _check_place(folder)
    window = None if context is None else _Window(context.window.known, context.window.first)
    where = TREE
    if isinstance(tree, DiskTree):
        where = _name_of(tree.folder)
        tree.commit()
    content = _Content(FORMAT, settings, hashes, len(tree), window, where, tail)
    with StagedFolder(folder) as staged:
        if where == TREE:
            with DiskTree(
                staged.path / TREE, tree.nets, gistnet_hash=hashes[0], index_hash=hashes[1]
            ) as copy:
                tree.copy_into(copy)
        files: dict[str, FileFacts] = {}
        if context is not None:
            arrays: dict[str, NDArray[Any]] = {"lods": context.lods, "starts": context.starts}
            if context.rescored is not None:
                arrays["rescored"] = context.rescored
            files[CONTEXT] = write_bytes(staged.path / CONTEXT, save(arrays))
        text = _CONTENT.dump_json(content, indent=1).decode() + "\n"
        files[SESSION] = write_text(staged.path / SESSION, text)
        write_manifest(staged.path, files)
        with _closed_tree(folder):
            staged.publish(replaces=_check_place)


def _name_of(tree: Path) -> str:
    """Return the absolute path of a tree on disk. Raises ConfigError if it is not valid UTF-8,
    which JSON requires.
    """
    where = str(tree.resolve())
    try:
        where.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the path of the tree, {where}, is not UTF-8, so a saved session cannot refer to it:"
            " rename its folder"
        ) from None
    return where


def read_session(folder: Path) -> SavedSession:
    """Return the session that `save_session` wrote. Raises ConfigError if there is none, or it is
    damaged.
    """
    recover(folder)
    if (folder / SESSION).exists() and (problem := damage(folder)):
        raise ConfigError(f"the saved session {folder} is damaged ({problem}): save it again")
    try:
        content = _CONTENT.validate_json(read_json_bytes(folder / SESSION))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not a saved session ({reason(error)}): give a folder that Session.save"
            " wrote"
        ) from None
    if content.format != FORMAT:
        raise ConfigError(
            f"the saved session {folder} has format {content.format}, but this version reads "
            f"{FORMAT}: ingest its tokens again"
        )
    return SavedSession(
        content.settings,
        content.hashes,
        content.tokens,
        folder / content.tree,  # an absolute path stays as it is
        content.tree == TREE,
        None if content.window is None else _read_context(folder / CONTEXT, content.window),
        content.tail,
    )


def _read_context(path: Path, window: _Window) -> SavedContext:
    try:
        with open_regular(path) as file:
            return SavedContext(path, window.known, window.first, **load(file.read()))
    except (OSError, SafetensorError, TypeError) as error:
        problem = "it holds other arrays" if isinstance(error, TypeError) else reason(error)
        raise ConfigError(
            f"the saved session {path.parent} is damaged ({path.name}: {problem}): save it again"
        ) from None


def _check_place(folder: Path) -> None:
    """Raise ConfigError if `folder` has files that are not part of a saved session."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SESSION).exists():
        raise ConfigError(f"{folder} exists and is not a saved session: give a new folder")
    trees = (path.name for path in (folder / TREE).glob("*") if path.name.startswith(OWN_NAMES))
    if foreign := foreign_files(folder, (f"{TREE}/{name}" for name in trees)):
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which is not part of the saved session: move it away "
            "or give a new folder"
        )


def _closed_tree(folder: Path) -> AbstractContextManager[Any]:
    """Prevent that the tree inside a saved session is opened within the block. Raises ConfigError
    if it is open.
    """
    return lock_tree(folder / TREE) if (folder / TREE).is_dir() else nullcontext()
