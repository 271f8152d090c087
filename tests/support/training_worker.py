"""One rank of training runs for the tests: `training_worker.py SCENARIOS.json OUT`, the rank in
the environment.

Scenarios run one after the other in this process; each is {"label": its name, "config": a
recipe, "nan": [step, micro, rank] or null, "stop_after": steps or null}. `nan` makes that
micro-step's loss not a number; `stop_after` abandons the run there, as a kill would. What the
run held before its first and after every step is saved as OUT/LABEL-RANK.pt.
"""

import copy
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mc_ds.config import RunConfig
from mc_ds.console import has_native_threads, run_program
from mc_ds.training.loop import Trainer
from mc_ds.training.ranks.distributed import read_rank_environment


class Abandoned(Exception):
    pass


def snapshot(trainer):
    weights = {}
    for name, parameter in trainer.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return {
        "weights": weights,
        "lens": copy.deepcopy(trainer.lens.state_dict()) if trainer.lens is not None else None,
    }


def watch(trainer, snapshots, nan, stop_after):
    run_step, backward = trainer.runner.run, trainer.engine.backward
    here = {"step": None, "micro": None}
    forwards = []
    if trainer.lens is not None:
        trainer.lens.lensnet.register_forward_hook(
            lambda *_: forwards.append((here["step"], here["micro"]))
        )

    def watched_step(step, batches, **options):
        if step == stop_after:
            raise Abandoned
        here.update(step=step, micro=-1)
        result = run_step(step, batches, **options)
        here.update(step=None)
        snapshots.append(
            {
                **snapshot(trainer),
                "lens_forwards": [place for place in forwards if place[0] is not None],
            }
        )
        return result

    def watched_backward(loss):
        here["micro"] += 1
        backward(
            loss * float("nan") if nan == [here["step"], here["micro"], dist.get_rank()] else loss
        )

    trainer.runner.run, trainer.engine.backward = watched_step, watched_backward


def run(label, config, out, nan=None, stop_after=None):
    with ExitStack() as held:  # the next run in this process may be of the same folder
        trainer = Trainer(RunConfig.model_validate(config), read_rank_environment(), held=held)
        snapshots = [snapshot(trainer)]
        watch(trainer, snapshots, nan, stop_after)
        try:
            trainer.fit()
        except Abandoned:
            assert stop_after is not None
    torch.save(snapshots, out / f"{label}-{dist.get_rank()}.pt")


def main(_: list[str]) -> int:
    """Do the work; return 0."""
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        run(**scenario, out=Path(sys.argv[2]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    has_native_threads()
    run_program(main)
