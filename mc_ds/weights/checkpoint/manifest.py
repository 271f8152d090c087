"""The manifest of a checkpoint: size and SHA-256 of every file, and the check of a folder against it."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mc_ds.storage import FileProof, file_damage, reason, replace_text

MANIFEST = "manifest.json"
READERS = 4
"""Files that a rank hashes at a time."""


def write_manifest(checkpoint: Path, proofs: Mapping[str, FileProof]) -> None:
    """Writes the manifest: with it the folder is complete."""
    files = {
        name: {"size": proof.size, "sha256": proof.sha256} for name, proof in sorted(proofs.items())
    }
    replace_text(checkpoint / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, FileProof]:
    """What each file must be. Raises ValueError, in one line, for a manifest that cannot be used."""
    path = checkpoint / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            name: FileProof(int(entry["size"]), str(entry["sha256"]))
            for name, entry in files.items()
        }
    except OSError as error:
        raise ValueError(f"no readable {MANIFEST}: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file it names has its size: quick, without reading the files."""
    try:
        return all(
            (checkpoint / name).stat().st_size == proof.size
            for name, proof in read_manifest(checkpoint).items()
        )
    except (OSError, ValueError):
        return False


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with `checkpoint`, or None: this reads and hashes every `shares`-th file from number `share` on."""
    try:
        proofs = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    mine = list(proofs.items())[share::shares]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda item: file_damage(checkpoint / item[0], item[1]), mine)
        return next((problem for problem in found if problem is not None), None)
