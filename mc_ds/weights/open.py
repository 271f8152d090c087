"""Loads a trained model for evaluation from a bundle, or from a run or checkpoint of any ZeRO stage and world size, without an engine."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.history import with_history
from mc_ds.data import PreparedCorpus, prepare_corpus
from mc_ds.focus.controller import MCController
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.training.checkpoint import find_checkpoint
from mc_ds.weights.bundle import is_bundle, open_bundle
from mc_ds.weights.checkpoint.shards import lens_weights, open_weights
from mc_ds.weights.export import read_source, run_corpus


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to evaluate, in evaluation mode."""

    config: RunConfig
    """At the history length asked for."""
    as_trained: bool
    """Whether that is the length it was trained at."""
    step: int
    model: MegaContextModel
    lensnet: LensNet | None
    controller: MCController
    corpus: PreparedCorpus
    device: torch.device


def load_trained(path: str, *, device: torch.device, seq_len: int | None = None) -> TrainedModel:
    """A bundle, the newest checkpoint of a run folder, or the checkpoint itself; `seq_len` evaluates another history length T.

    Raises ConfigError where there is no complete checkpoint or bundle.
    """
    load = _load_bundle if is_bundle(path) else _load_checkpoint
    return load(Path(path), device, seq_len)


def _load_bundle(path: Path, device: torch.device, seq_len: int | None) -> TrainedModel:
    """The corpus of its config is encoded with the bundle's own tokenizer."""
    bundle = open_bundle(path)
    config = bundle.config if seq_len is None else with_history(bundle.config, seq_len)
    corpus = prepare_corpus(config.data.model_copy(update={"tokenizer": str(path)}))
    model, lensnet = bundle.load(device=device, seq_len=seq_len)
    return TrainedModel(
        config,
        config is bundle.config,
        bundle.step,
        model,
        lensnet,
        MCController(lensnet),
        corpus,
        device,
    )


def _load_checkpoint(path: Path, device: torch.device, seq_len: int | None) -> TrainedModel:
    if not path.exists():
        raise ConfigError(
            f"checkpoint = {path} does not exist: give a run folder, one of its checkpoints, or a bundle"
        )
    checkpoint = find_checkpoint(str(path), path)
    if checkpoint is None:
        raise ConfigError(
            f"checkpoint = {path}: no complete checkpoint there; give a run folder or one of its checkpoints"
        )
    source = read_source(checkpoint)
    config = source.config if seq_len is None else with_history(source.config, seq_len)
    corpus = run_corpus(source)
    model = MegaContextModel(config, vocab_size=corpus.tokenizer.vocab_size)
    model.load_state_dict(read_weights(checkpoint))
    lensnet = None
    if config.mc.num_random_variants:
        lensnet = LensNet(config.mc, dim=config.backbone.dim)
        lensnet.load_state_dict(
            {name: tensor.read() for name, tensor in lens_weights(checkpoint).items()}
        )
        lensnet = lensnet.to(device).eval()
    return TrainedModel(
        config,
        config is source.config,
        source.step,
        model.to(device).eval(),
        lensnet,
        MCController(lensnet),
        corpus,
        device,
    )


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of backbone and GistNet by name, whole, on the CPU, tied names included, whatever the ZeRO stage and the number of ranks."""
    return open_weights(checkpoint).state_dict()
