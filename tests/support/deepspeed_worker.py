"""One process, no launcher: trains a tiny model with each DeepSpeed config given and makes the
second step's gradient not finite.

Prints one JSON line per (config, precision). A process of its own, because DeepSpeed's
accelerator and process group are global.
"""

import json
import os
import sys
import tempfile

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")

import deepspeed
import torch

from mc_ds.config import RunConfig
from mc_ds.console import has_native_threads, run_program
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config


def parameters(model):
    values = []
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            values.append(parameter.detach().float().flatten().clone())
    return torch.cat(values)


def run(path, precision):
    settings = {"deepspeed_config": path, "train": {"global_batch_size": 2, "precision": precision}}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 96), torch.nn.Linear(96, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ds_config = resolve_deepspeed_config(RunConfig.model_validate(settings), 1, "cpu")
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    applied, changed, before = [], [], parameters(model)
    for factor in (1.0, float("nan"), 1.0, float("inf"), 1.0):
        for micro in range(2):
            loss = engine(torch.randn(1, 160, dtype=dtype)).float().square().mean()
            engine.backward(loss * factor if micro == 0 else loss)
            engine.step()
        after = parameters(model)
        applied.append(engine.was_step_applied())
        changed.append(not torch.equal(before, after))
        before = after
    finite = bool(torch.isfinite(before).all())
    return {
        "applied": applied,
        "changed": changed,
        "skipped": engine.skipped_steps,
        "finite": finite,
    }


def main(_: list[str]) -> int:
    """Do the work; return 0."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        deepspeed.init_distributed(
            dist_backend="gloo", auto_mpi_discovery=False, init_method=meeting, rank=0, world_size=1
        )
        for path in sys.argv[1:]:
            for precision in ("fp32", "bf16"):
                result = run(path, precision)
                print(
                    "RESULT " + json.dumps({"path": path, "precision": precision, **result}),
                    flush=True,
                )
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    has_native_threads()
    run_program(main)
