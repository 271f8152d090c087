"""Durable files and folders.

    files.py      writes and hashes durable files; replaces files atomically
    reading.py    reads regular files only, and JSON of a bounded size
    folders.py    publishes complete folders, replaces them, and recovers after a crash
    locks.py      one owner at a time, also on network file systems (lock_file.py, owner.py)
    manifest.py   the list of a folder's files with their sizes and hashes

A temporary entry is named after its target, with a kind and a random token appended
(`notes.partial-4f0c...`), so that it cannot be confused with other files.
"""

from mc_ds.storage.files import (
    FileFacts,
    HashingFile,
    fingerprint,
    replace_file,
    replace_text,
    sync_file,
    sync_folder,
    write_bytes,
    write_tensors,
    write_text,
)
from mc_ds.storage.folders import (
    StagedFolder,
    recover,
    recover_all,
    remove_folder,
    remove_leftovers,
)
from mc_ds.storage.locks import Lock, LockHeldError
from mc_ds.storage.manifest import (
    MANIFEST,
    damage,
    foreign_files,
    is_complete,
    read_manifest,
    write_manifest,
)
from mc_ds.storage.reading import open_regular, path_of, read_json, read_json_bytes, reason

__all__ = [
    "MANIFEST",
    "FileFacts",
    "HashingFile",
    "Lock",
    "LockHeldError",
    "StagedFolder",
    "damage",
    "fingerprint",
    "foreign_files",
    "is_complete",
    "open_regular",
    "path_of",
    "read_json",
    "read_json_bytes",
    "read_manifest",
    "reason",
    "recover",
    "recover_all",
    "remove_folder",
    "remove_leftovers",
    "replace_file",
    "replace_text",
    "sync_file",
    "sync_folder",
    "write_bytes",
    "write_manifest",
    "write_tensors",
    "write_text",
]
