"""Builds the DeepSpeed engine: sharded initialisation, decay groups, frozen parameters,
compilation.
"""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from mc_ds.config import ConfigError, RunConfig
from mc_ds.model.backbone import DecoderBlock, LossHead
from mc_ds.model.backbone.layers import TransformerBlock, transformer_block
from mc_ds.model.backbone.loss import chunk_gradients, chunk_nll
from mc_ds.model.build import build_model
from mc_ds.model.gistnet import GistNet
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.training.engine.zero3 import SHORTCUTS, Shortcut, take_shortcuts

NO_DECAY = (
    "norm",
    "bias",
    "gain",
    "sink_logit",
    "trust",
    "level_embedding",
    "lod_embedding",
    "tail_embedding",
)
"""Parameters whose names contain one of these have no weight decay."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: one with weight decay, one without (see NO_DECAY)."""
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
    """Return the model, initialised with the run's seed.

    With ZeRO-3 every parameter is partitioned on creation, so that no rank holds the whole model.
    """
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
    """Return whether `train.frozen` freezes the model's parameter `name`."""
    return frozen == "all" or (frozen == "backbone" and name.startswith("backbone."))


def freeze(model: MegaContextModel, frozen: Frozen) -> None:
    """Set `requires_grad` of frozen parameters to False. Call it before `build_engine`.

    ZeRO needs at least one parameter to optimize. If the whole model is frozen, that is the final
    norm; it gets no gradient, because the trainer then never calls the engine's backward pass.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, frozen))
    if frozen == "all":
        model.backbone.norm.weight.requires_grad_(True)


def build_engine(
    config: RunConfig,
    ds_config: dict[str, Any],
    model: MegaContextModel,
    device: torch.device,
    *,
    shortcuts: Collection[Shortcut] = SHORTCUTS,
) -> Any:
    """Return a DeepSpeed engine with torch's AdamW. The training loop sets its learning rate.

    `shortcuts` are the parts of ZeRO-3 that mc_ds replaces. Nothing is replaced with offloading.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train.weight_decay),
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        fused=device.type == "cuda" and not _offloads_optimizer(ds_config),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=with_fitting_buckets(ds_config, model),
        dist_init_required=False,
    )
    if _offloads_optimizer(ds_config) or _offloads(ds_config, "offload_param"):
        return engine
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        read_gradients_once(engine.optimizer)
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        compiled = use_compilation(config, device)
        take_shortcuts(engine.optimizer, compiled=compiled, shortcuts=shortcuts)
    return engine


def with_fitting_buckets(ds_config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return `ds_config` with a bucket of gradients that is no larger than what learns, because
    DeepSpeed allocates the whole bucket.
    """
    zero = ds_config["zero_optimization"]
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    size = zero.get("reduce_bucket_size")
    if isinstance(size, int | float):
        zero = {**zero, "reduce_bucket_size": min(size, elements)}
    return {**ds_config, "zero_optimization": zero}


NORM_PIECE = 2**24
"""Elements of a gradient processed at a time for its norm, because DeepSpeed copies them to
float64.
"""


def read_gradients_once(optimizer: Any) -> None:
    """Make the optimizer of ZeRO-2 (and of ZeRO-1 in fp32) read gradients once per step, not twice.

    DeepSpeed searches gradients for non-finite values, then computes their norm, and skips the step
    if either check fails. The norm alone detects the same steps, so this removes the search. If
    all gradients of a rank are in one buffer, the norm of that buffer is computed.
    """
    norm_of_tensors = optimizer.get_grad_norm_direct

    def norm(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        whole = getattr(gradients, "flat_partition", None)
        if whole is None or not params:
            return norm_of_tensors(gradients, params, norm_type)
        pieces = whole.split(NORM_PIECE)
        return norm_of_tensors(pieces, [params[0]] * len(pieces), norm_type)

    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = norm


def use_compilation(config: RunConfig, device: torch.device) -> bool:
    """Return whether this run compiles its transformer blocks."""
    return config.train.compile == "on" or (
        config.train.compile == "auto" and device.type == "cuda"
    )


SMALL_MICRO_STEP = 1e13
"""Operations of a micro-step below which launching kernels takes longer than running them: about 25
ms on a GPU.
"""


def use_graphs(
    config: RunConfig, ds_config: dict[str, Any], model: nn.Module, device: torch.device
) -> bool:
    """Return whether forward and backward of model and LensNet run as CUDA graphs.

    Raises ConfigError if `train.cuda_graphs` is "on" but graphs are impossible.
    """
    wanted, stage = config.train.cuda_graphs, ds_config["zero_optimization"]["stage"]
    possible = device.type == "cuda" and stage < 3
    if wanted == "on" and not possible:
        raise ConfigError(
            "train.cuda_graphs = on needs a GPU and ZeRO stage 1 or 2; this run has device"
            f" {device.type} and stage {stage}: use train.cuda_graphs = auto"
        )
    weights = sum(parameter.numel() for parameter in model.parameters())
    longest = max(config.mc.rows_at(length) * length for length in config.mc.wc_lengths)
    entries = config.train.micro_batch_size * longest
    # Per weight and entry, forward takes two operations and backward four.
    is_small = 6 * weights * entries < SMALL_MICRO_STEP
    return possible and (wanted == "on" or (wanted == "auto" and is_small))


def compile_blocks(modules: Iterable[nn.Module], *, num_shapes: int) -> None:
    """Compile the functions of all transformer blocks and of the loss head, but not the modules
    with their hooks.

    `num_shapes` is the number of different working-context lengths W in the run. It determines how
    often Dynamo may recompile a function: beyond that limit Dynamo would silently run eagerly, so
    exceeding it raises an error. Evaluation is never compiled.
    """
    torch._dynamo.config.recompile_limit = max(8, 4 + 4 * num_shapes)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    block_function = torch.compile(transformer_block, dynamic=False)
    nll_function = torch.compile(chunk_nll, dynamic=False)
    gradients_function = torch.compile(chunk_gradients, dynamic=False)
    for root in modules:
        for module in root.modules():
            if isinstance(module, TransformerBlock):
                module.function = block_function
            elif isinstance(module, LossHead):
                module.chunk_nll, module.chunk_gradients = nll_function, gradients_function


def compile_lensnet(lensnet: LensNet, *, whole: bool) -> None:
    """Compile LensNet after `compile_blocks`: as one function if `whole`, which fuses its many
    small operations, or else its blocks alone, for a caller that captures it as a CUDA graph.
    """
    if whole:
        lensnet.graphed = torch.compile(lensnet.row_scores, dynamic=False, fullgraph=True)
    else:
        function = torch.compile(transformer_block, dynamic=False)
        for module in lensnet.modules():
            if isinstance(module, TransformerBlock):
                module.function = function


def _offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    return _offloads(ds_config, "offload_optimizer")


def _offloads(ds_config: dict[str, Any], what: str) -> bool:
    offload = ds_config["zero_optimization"].get(what) or {}
    return offload.get("device", "none") != "none"
