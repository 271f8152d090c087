"""A rank that trains a small model under ZeRO-3 three times: with DeepSpeed's own step, with ours,
and with ours made slow, so that whatever does not wait for it reads old weights.

    torchrun --nproc_per_node 2 zero3_worker.py

Rank 0 prints a JSON object of the losses and gradient norms of each: pairs [loss, norm], by step.
The batch is always the same and the learning rate high, so that losses after old and new weights
differ much.
"""

import json
from typing import Any

import torch

from mc_ds.console import run_program
from mc_ds.training.engine import zero3
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.engine.engine import build_engine, build_sharded_model
from mc_ds.training.ranks.distributed import (
    device_type,
    read_rank_environment,
    start_distributed,
)
from tests.support.factories import VOCAB, mc_config, plan, run_config, tokens

STEPS = 5
SLEEP = int(3e8)
"""Cycles of the GPU before each update: more than 0.1 s."""
update_all = zero3.Zero3Step._update_all


def slow_update(*arguments: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda._sleep(SLEEP)
    update_all(*arguments)


def steps(
    device: torch.device, ranks: int, rank: int, shortcuts: tuple[Any, ...]
) -> list[list[float]]:
    mc = mc_config()
    config = run_config(
        mc,
        backbone=dict(dim=128, num_layers=6, ffn_dim=512),
        global_batch_size=2 * ranks,
        micro_batch_size=2,
        precision="fp32",
        compile="on" if device.type == "cuda" else "off",
    )
    config = config.model_copy(update={"deepspeed_config": "ds_configs/zero3.json"})
    ds_config = resolve_deepspeed_config(config, ranks, device_type())
    ds_config["zero_optimization"]["sub_group_size"] = 100_000
    model = build_sharded_model(config, ds_config, vocab_size=VOCAB)
    engine = build_engine(config, ds_config, model, device, shortcuts=shortcuts)
    lods, starts = (part.to(device) for part in plan(mc, 2))
    ids = tokens(mc, 2, seed=rank).to(device)  # norms of the sum need both ranks
    found = []
    for _ in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.01
        loss = engine(ids, lods, starts).loss
        engine.backward(loss)
        engine.step()
        found.append([float(loss.detach()), float(engine.get_global_grad_norm())])
    return found


def main(_: list[str]) -> int:
    """Do the work; return 0."""
    env = read_rank_environment()
    device = start_distributed(env)
    given = device, env.world_size, env.rank
    results = {"deepspeed": steps(*given, ()), "ours": steps(*given, zero3.SHORTCUTS)}
    zero3.Zero3Step._update_all = slow_update
    results["slow"] = steps(*given, zero3.SHORTCUTS)
    if env.is_main:
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_program(main)
