"""Conversion of a checkpoint to DeepSpeed's universal format, from any ZeRO stage, loadable under
any: one file per parameter and state.

`python -m mc_ds.training.checkpoint.universal CHECKPOINT FOLDER` writes FOLDER/<name of the
checkpoint>. DeepSpeed's converter leaves formats that only the stage which wrote them can load;
what differs between stages 1-2 and 3 is made equal here.
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

SOURCE = "source.sha256"
"""In the converted folder: the hash of the manifest that it was made from; with it the conversion
is complete."""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Where stages 1-2 and stage 3 look for the counts of the engine."""


def is_converted(checkpoint: Path, folder: Path) -> bool:
    """Return whether `folder` holds the complete conversion of this very checkpoint."""
    try:
        return (folder / SOURCE).read_text().strip() == fingerprint(checkpoint / MANIFEST).sha256
    except OSError:
        return False


def convert(checkpoint: Path, folder: Path) -> None:
    """Convert `checkpoint` into `folder`, which appears complete or not at all; an older conversion
    there is replaced.
    """
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
    """Raise ConfigError for a folder that is no conversion."""
    if not (folder / SOURCE).exists():
        raise ConfigError(f"{folder} is no converted checkpoint: move it away")


def _make_equal_for_all_stages(checkpoint: Path, output: Path) -> None:
    """Tensors with their shapes in dictionaries, a step count per parameter and one for all, model
    states under both names."""
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
    """Return the steps that the optimizer has taken: beside the parameters (stages 1-2) or in the
    common state (stage 3).
    """
    beside = zero / parameter / "step.pt"
    step = _load(beside) if beside.exists() else common["optimizer_state_dict"]["state"][0]["step"]
    return torch.as_tensor(step, dtype=torch.float32)


def _load(path: Path) -> Any:
    return torch.load(
        path, map_location="cpu", weights_only=False
    )  # DeepSpeed's files hold classes of its own


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
