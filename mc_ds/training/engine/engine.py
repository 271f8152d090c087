"""The DeepSpeed engine around the root module: initialisation without a full copy per rank, decay groups, leaf modules, compilation."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import deepspeed
import torch
from torch import nn

from mc_ds.config import RunConfig
from mc_ds.model.backbone import DecoderBlock, LossHead
from mc_ds.model.backbone.layers import TransformerBlock, transformer_block
from mc_ds.model.backbone.loss import chunk_nll
from mc_ds.model.build import build_model
from mc_ds.model.gistnet import GistNet
from mc_ds.model.megacontext import MegaContextModel

NO_DECAY = (
    "norm",
    "bias",
    "gain",
    "sink_logit",
    "level_embedding",
    "lod_embedding",
    "tail_embedding",
)
"""Parts of names of parameters without weight decay."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices and embeddings decay; norms, gains, biases and level embeddings do not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if not any(word in name for word in NO_DECAY)]
    others = [p for name, p in named if any(word in name for word in NO_DECAY)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_sharded_model(
    config: RunConfig, ds_config: dict[str, Any], *, vocab_size: int
) -> MegaContextModel:
    """The root module with the run's seed; under ZeRO-3 every parameter is partitioned as soon as it exists."""
    torch.manual_seed(config.seed)
    sharded = ds_config["zero_optimization"]["stage"] == 3
    context: AbstractContextManager[Any] = (
        deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else nullcontext()
    )
    with context:
        model = build_model(config, vocab_size=vocab_size)
    if sharded:
        leaves = [DecoderBlock, GistNet] if config.mc.num_random_variants else [DecoderBlock]
        deepspeed.utils.set_z3_leaf_modules(model, leaves)
    return model


Frozen = Literal["none", "backbone", "all"]


def is_frozen(name: str, frozen: Frozen) -> bool:
    """Whether the model's parameter `name` keeps its weights under `train.frozen`."""
    return frozen == "all" or (frozen == "backbone" and name.startswith("backbone."))


def freeze(model: MegaContextModel, frozen: Frozen) -> None:
    """Takes what does not learn out of the optimizer, before there is one.

    ZeRO cannot be without a parameter to optimize. Where nothing of the model learns, the final norm holds that place: no gradient ever
    reaches it, as the trainer then never calls the engine's backward.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, frozen))
    if frozen == "all":
        model.backbone.norm.weight.requires_grad_(True)


def build_engine(
    config: RunConfig, ds_config: dict[str, Any], model: MegaContextModel, device: torch.device
) -> Any:
    """DeepSpeed engine with a client AdamW; its learning rate is set by the loop at every step."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train.weight_decay),
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        fused=device.type == "cuda" and not _offloads_optimizer(ds_config),
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    return engine


def use_compilation(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks are compiled in this run."""
    return config.train.compile == "on" or (
        config.train.compile == "auto" and device.type == "cuda"
    )


def compile_blocks(modules: Iterable[nn.Module], *, num_shapes: int) -> None:
    """Compiles the pure functions behind every transformer block and the loss head; modules and their hooks stay outside.

    Dynamo silently runs eagerly beyond its limit of variants per function, so the limit is derived from `num_shapes` (working-context
    lengths of the run; decoder and lens blocks see each of them, gist blocks one shape per level) and exceeding it is an error.
    Evaluation is never compiled.
    """
    torch._dynamo.config.recompile_limit = max(8, 4 + 4 * num_shapes)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    block_function = torch.compile(transformer_block, dynamic=False)
    loss_function = torch.compile(chunk_nll, dynamic=False)
    for root in modules:
        for module in root.modules():
            if isinstance(module, TransformerBlock):
                module.function = block_function
            elif isinstance(module, LossHead):
                module.chunk_nll = loss_function


def _offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"
