"""`open_weights` opens weights of any format; `load_trained` loads a model with its corpus for
evaluation.

Opening needs neither an engine nor DeepSpeed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.trained import with_history
from mc_ds.data import OtherText, RunData
from mc_ds.focus.controller import MCController
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.storage import MANIFEST, path_of, recover
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.checkpoint.read import open_checkpoint
from mc_ds.weights.layout import CONFIG
from mc_ds.weights.pretrained import GGUFFile, HFFolder, Pretrained
from mc_ds.weights.report import warn
from mc_ds.weights.weights import Weights


def open_weights(
    path: str | Path, *, verify: bool = True, report: Callable[[str], None] = warn
) -> Weights:
    """Open a run's folder, a checkpoint, a bundle, a Hugging Face folder or a GGUF file.

    `verify` reads and hashes all files that have a manifest. For a run, the newest undamaged
    checkpoint is opened, and `report` gets a line if newer ones are damaged. Raises ConfigError, in
    one line, for a path that is none of these and for files that are damaged or not supported.
    """
    path = Path(os.path.expanduser(path_of(path)))
    recover(path)
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: give the folder of a run, of a checkpoint or of a bundle, "
            "a Hugging Face folder, or a GGUF file"
        )
    if not path.is_dir():
        return Pretrained(GGUFFile(path))
    if (path / CONFIG).exists() or any(path.glob("*.safetensors")):
        if (path / MANIFEST).exists():
            return open_bundle(path, verify=verify)
        return Pretrained(HFFolder(path))
    return open_checkpoint(path, verify=verify, report=report)


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with its corpus."""

    config: RunConfig
    """The run's config, with `mc.seq_len` set to the requested history length."""
    as_trained: bool
    """True if that is the length that it was trained at."""
    step: int
    model: MegaContextModel
    lensnet: LensNet | None
    controller: MCController
    corpus: RunData
    device: torch.device


def load_trained(
    path: str,
    *,
    device: torch.device,
    seq_len: int | None = None,
    text: OtherText | None = None,
) -> TrainedModel:
    """Load weights of any format on `device` and open their corpus, or another `text`. `seq_len`
    replaces the history length T.

    Raises ConfigError if weights or corpus cannot be opened.
    """
    weights = open_weights(path)
    config = weights.config if seq_len is None else with_history(weights.config, seq_len)
    corpus = weights.corpus(other=text)
    model, lensnet = weights.load(device=device, seq_len=seq_len)
    return TrainedModel(
        config,
        config is weights.config,
        weights.step,
        model,
        lensnet,
        MCController(lensnet),
        corpus,
        device,
    )
