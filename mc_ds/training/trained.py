"""Loads a trained model for evaluation from a run or a checkpoint of any ZeRO stage and world size, without an engine."""

from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.recipe import read_recipe
from mc_ds.controller import MCController
from mc_ds.data import PreparedCorpus, prepare_corpus
from mc_ds.lensnet import LensNet
from mc_ds.model import MegaContextModel
from mc_ds.training.checkpoint import find_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to evaluate, in evaluation mode."""

    config: RunConfig
    step: int
    model: MegaContextModel
    lensnet: LensNet | None
    controller: MCController
    corpus: PreparedCorpus
    device: torch.device


def load_trained(path: str, *, device: torch.device, seq_len: int | None = None) -> TrainedModel:
    """The newest checkpoint of a run folder, or the checkpoint itself; `seq_len` evaluates another history length T.

    Raises ConfigError where there is no complete checkpoint.
    """
    checkpoint = find_checkpoint(path, Path(path))
    if checkpoint is None:
        raise ConfigError(f"checkpoint = {path}: no complete checkpoint there; give a run folder or one of its checkpoints")
    config = RunConfig.model_validate(read_recipe(checkpoint.parent.parent / "config.yaml"))
    if seq_len is not None:
        config = with_history(config, seq_len)
    corpus = prepare_corpus(config.data)
    model = MegaContextModel(config, vocab_size=corpus.tokenizer.vocab_size)
    model.load_state_dict(read_weights(checkpoint))
    lensnet = None
    if config.mc.num_random_variants:
        lensnet = LensNet(config.mc, dim=config.backbone.dim)
        lensnet.load_state_dict(torch.load(checkpoint / "lens.pt", map_location="cpu", weights_only=True)["lensnet"])
        lensnet = lensnet.to(device).eval()
    step = int(checkpoint.name.removeprefix("step_"))
    return TrainedModel(config, step, model.to(device).eval(), lensnet, MCController(lensnet), corpus, device)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of backbone and GistNet by name, whole, on the CPU, whatever the ZeRO stage and the number of ranks."""
    if any(checkpoint.glob("bf16_zero_*")):
        # Stage 1 with float32 accumulation keeps its master weights in another format; the bf16 weights that ran are beside them, whole.
        states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = states["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return weights


def with_history(config: RunConfig, seq_len: int) -> RunConfig:
    """The same model reading histories of `seq_len` tokens; W becomes the reachable length nearest below the same share of T."""
    mc = config.mc.model_dump()
    share = config.mc.train_wc_length / config.mc.seq_len
    geometry = config.mc.geometry.with_length(seq_len)
    mc |= {"seq_len": seq_len, "train_wc_length": geometry.reachable_at_most(share * seq_len), "wc_schedule": []}
    return RunConfig.model_validate({**config.model_dump(), "mc": mc})
