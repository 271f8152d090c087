"""One of two ranks: takes a bf16 step of a tiny model with each DeepSpeed config given and notes
which dtypes are reduced.

    python reduction_worker.py RANK MEETING CONFIG...

Prints one JSON line per config. A process of its own, because DeepSpeed's accelerator and process
group are global.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE="2")

import deepspeed
import torch
import torch.distributed as dist

from mc_ds.config import RunConfig
from mc_ds.console import has_native_threads, run_program
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config

RANK, MEETING, *PATHS = sys.argv[1:]
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
FEW = 64
"""Numbers of a tensor that is no gradient: norms, flags."""


@contextmanager
def noted(dtypes: set[str]) -> Iterator[None]:
    """Notes the dtypes of what DeepSpeed reduces."""
    backend = deepspeed.comm.comm.cdb
    before = {name: getattr(backend, name) for name in REDUCTIONS if hasattr(backend, name)}

    def noting(reduction: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            for tensor in (*arguments, *options.values()):
                if isinstance(tensor, torch.Tensor) and tensor.numel() > FEW:
                    dtypes.add(str(tensor.dtype))
            return reduction(*arguments, **options)

        return call

    for name, reduction in before.items():
        setattr(backend, name, noting(reduction))
    yield
    for name in before:
        delattr(backend, name)


def reduced_dtypes(path: str) -> list[str]:
    settings = {"deepspeed_config": path, "train": {"global_batch_size": 2, "precision": "bf16"}}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 96), torch.nn.Linear(96, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ds_config = resolve_deepspeed_config(RunConfig.model_validate(settings), 2, "cpu")
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    loss = engine(torch.randn(1, 160, dtype=torch.bfloat16)).float().square().mean()
    dtypes: set[str] = set()
    with noted(dtypes):
        engine.backward(loss)
        engine.step()
    return sorted(dtypes)


def main(_: list[str]) -> int:
    """Do the work; return 0."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{MEETING}",
        rank=int(RANK),
        world_size=2,
    )
    for path in PATHS:
        print("RESULT " + json.dumps({"path": path, "dtypes": reduced_dtypes(path)}), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    has_native_threads()
    run_program(main)
