"""Converts a checkpoint of any ZeRO stage to DeepSpeed's universal format (one file per parameter
and state), loadable with any stage.

`python -m mc_ds.training.checkpoint.universal CHECKPOINT FOLDER [--trusted]` writes FOLDER/<name of
the checkpoint>. The output of DeepSpeed's converter can only be loaded with the stage that wrote
the checkpoint (stages 1 and 2 count as one); this module removes that restriction.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

from mc_ds.config import ConfigError
from mc_ds.storage import MANIFEST, StagedFolder, fingerprint, write_tensors, write_text
from mc_ds.weights.checkpoint.screen import problem_of_pickles, refusal

SOURCE = "source.sha256"
"""File with the hash of the converted checkpoint's manifest. It is written last and marks the
conversion as complete.
"""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Files from which stages 1-2 and stage 3, respectively, load the engine's counters."""


def is_converted(checkpoint: Path, folder: Path) -> bool:
    """Return whether `folder` is a complete conversion of exactly this checkpoint."""
    try:
        return (folder / SOURCE).read_text().strip() == fingerprint(checkpoint / MANIFEST).sha256
    except OSError:
        return False


def convert(checkpoint: Path, folder: Path, *, trusted: bool = False) -> None:
    """Convert `checkpoint` into `folder`, atomically. An older conversion there is replaced.

    Raises ConfigError for a checkpoint that could run code, unless `trusted`.
    """
    if not trusted and (problem := problem_of_pickles(checkpoint)):
        raise refusal(checkpoint, problem)
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with StagedFolder(folder, lock=False) as staged:
        output = staged.path / checkpoint.name
        (output / "zero").mkdir(parents=True)
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(checkpoint),
                output_folder=str(output),
                num_extract_workers=workers,
                num_merge_workers=workers,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        _make_equal_for_all_stages(checkpoint, output)
        write_text(staged.path / SOURCE, fingerprint(checkpoint / MANIFEST).sha256 + "\n")
        staged.publish(replaces=_check_conversion)


def _check_conversion(folder: Path) -> None:
    """Raise ConfigError for a folder that is not a conversion."""
    if not (folder / SOURCE).exists():
        raise ConfigError(
            f"{folder} exists and is not a converted checkpoint: move it away, then try again"
        )


def _make_equal_for_all_stages(checkpoint: Path, output: Path) -> None:
    """Rewrite a conversion so that all stages can load it: tensors in dictionaries and with their
    shapes, step counts both per parameter and common, model states under both file names.
    """
    present = next(name for name in MODEL_STATES if (output / name).exists())
    other = next(name for name in MODEL_STATES if name != present)
    shutil.copyfile(output / present, output / other)
    groups = _load(checkpoint / present)["param_shapes"]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    optimizer_file = output / "zero" / "optimizer_state.pt"
    common = _load(optimizer_file)
    step = _step(common, output / "zero", next(iter(shapes)))
    inner = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    small = {
        key: value
        for key, value in common.items()
        if key not in ("fp32_flat_groups", "optimizer_state_dict")
    }
    write_tensors(
        optimizer_file,
        {"ds_version": deepspeed.__version__, **small, "optimizer_state_dict": inner},
    )
    for name, shape in shapes.items():
        folder = output / "zero" / name
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            content = _load(folder / f"{state}.pt")
            tensor = content["param"] if isinstance(content, Mapping) else content
            write_tensors(folder / f"{state}.pt", {"param": tensor.reshape(shape), "cat_dim": 0})
        write_tensors(folder / "step.pt", step)


def _step(common: Mapping[str, Any], zero: Path, parameter: str) -> torch.Tensor:
    """Return the optimizer's step count, stored with each parameter (stages 1-2) or in the common
    state (stage 3).
    """
    beside = zero / parameter / "step.pt"
    step = _load(beside) if beside.exists() else common["optimizer_state_dict"]["state"][0]["step"]
    return torch.as_tensor(step, dtype=torch.float32)


def _load(path: Path) -> Any:
    """Unpickle a file of a screened or trusted checkpoint, or of its conversion.

    `weights_only` is off, because DeepSpeed's files contain its own classes.
    """
    return torch.load(path, map_location="cpu", weights_only=False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), trusted="--trusted" in sys.argv[3:])
