"""Builds the `StepRunner`: engine and LensNet, with compiled blocks and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch

from mc_ds.config import RunConfig
from mc_ds.focus.controller import MCController
from mc_ds.model.lensnet import LensNet
from mc_ds.training.engine.engine import (
    compile_blocks,
    compile_lensnet,
    use_compilation,
    use_graphs,
)
from mc_ds.training.engine.graphs import GraphedFunction
from mc_ds.training.lens import ReplicatedLens
from mc_ds.training.step import StepRunner


def assemble_runner(
    config: RunConfig,
    ds_config: dict[str, Any],
    engine: Any,
    lensnet: LensNet | None,
    device: torch.device,
    mark: Callable[[str], None] = lambda phase: None,
) -> StepRunner:
    """Return the `StepRunner` for a DeepSpeed engine and LensNet, both on `device` and initialised.

    A collective: LensNet gets rank 0's weights. `mark` is called with the name of each phase as it
    begins. Raises ConfigError if `train.cuda_graphs` is "on" but graphs are impossible.
    """
    model = engine.module
    lens = ReplicatedLens(lensnet, config.mc, config.train) if lensnet is not None else None
    graphs = use_graphs(config, ds_config, model, device)
    if use_compilation(config, device):
        compile_blocks([model], num_shapes=len(config.mc.wc_lengths))
        if lensnet is not None:
            compile_lensnet(lensnet, whole=not graphs)
    autocast = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else None
    runner = StepRunner(config, engine, lens, MCController(lensnet), device, autocast, mark)
    if graphs:
        model.graphed = GraphedFunction(model.micro_step, model)
        if lensnet is not None:
            lensnet.graphed = GraphedFunction(lensnet.row_scores, lensnet)
    if device.type == "cuda" and config.train.cuda_graphs != "off":
        runner.graph_losses()
    return runner
