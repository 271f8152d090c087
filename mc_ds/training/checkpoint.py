"""Checkpoints of engine, LensNet and trainer: written aside, verified by a manifest, renamed whole.

A checkpoint is a folder `checkpoints/step_00000123/` with DeepSpeed's shards, `lens.pt` (LensNet, its optimizer, its statistics),
`trainer.json` (step, controller counts, run identity) and `manifest.json` (size of every file). `latest` names the newest.
DeepSpeed itself writes shards to their final place and `latest` before the last barrier, so a kill would leave a torn checkpoint.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mc_ds.config import ConfigError

MANIFEST = "manifest.json"
TRAINER = "trainer.json"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, engine: Any, *, step: int, lens_state: dict[str, Any] | None, trainer_state: dict[str, Any], keep_last: int
) -> Path:
    """Saves on all ranks together and returns the finished checkpoint.

    Once it is complete, older ones beyond `keep_last` are removed, and so are those of later steps: a run that started over, or from an
    earlier checkpoint, has left them behind, and resuming must not find them.
    """
    name = checkpoint_name(step)
    final, aside = folder / name, folder / f"{name}.tmp"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=aside.name, client_state={"torch_rng": torch.get_rng_state()}, save_latest=False)
    if is_main:
        if lens_state is not None:
            torch.save(lens_state, aside / "lens.pt")
        (aside / TRAINER).write_text(json.dumps({"step": step, **trainer_state}, indent=1))
    dist.barrier()
    if is_main:
        _write_manifest(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _replace_text(folder / "latest", name)
        complete = list_checkpoints(folder)
        current = complete.index(final)
        for old in (*complete[:current], *complete[current + keep_last :]):
            shutil.rmtree(old)
    dist.barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, newest first: those whose every file has the size its manifest says."""
    return [path for path in sorted(folder.glob("step_*"), reverse=True) if not path.name.endswith(".tmp") and is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file it names has its size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def find_checkpoint(resume: str, folder: Path, world_size: int) -> Path | None:
    """The checkpoint that `--resume auto|never|PATH` means, or None to start fresh.

    Raises ConfigError for an unusable PATH, and for a checkpoint that another number of ranks has written.
    """
    if resume == "never":
        return None
    path = Path(resume)
    if resume == "auto":
        candidates = list_checkpoints(folder)
    else:
        candidates = [*([path] if is_complete(path) else []), *list_checkpoints(path), *list_checkpoints(path / "checkpoints")]
        if not candidates:
            raise ConfigError(f"resume = {resume} is neither a complete checkpoint nor a run that has one: use auto, never, or such a path")
    if not candidates:
        return None
    ranks = json.loads((candidates[0] / TRAINER).read_text())["world_size"]
    if ranks != world_size:
        raise ConfigError(f"{candidates[0]} was written by {ranks} ranks, this run has {world_size}: start {ranks}, or use resume = never")
    return candidates[0]


def load_checkpoint(checkpoint: Path, engine: Any, device: torch.device) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Restores the engine and returns (trainer state, LensNet state or None)."""
    _, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    torch.set_rng_state(client["torch_rng"])
    trainer = json.loads((checkpoint / TRAINER).read_text())
    lens_file = checkpoint / "lens.pt"
    lens = torch.load(lens_file, map_location=device, weights_only=True) if lens_file.exists() else None
    return trainer, lens


def _write_manifest(checkpoint: Path) -> None:
    """Flushes every file to disk, then writes the manifest beside them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    _replace_text(checkpoint / MANIFEST, json.dumps({"sizes": sizes}, indent=1))


def _replace_text(path: Path, text: str) -> None:
    """Writes a small file so that readers see the old or the new text, never a part."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)
