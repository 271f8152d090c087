"""One rank of engines for the export tests: `export_worker.py SCENARIOS.json OUT`, the rank in
the environment.

Each scenario is {"label", "stage", "precision"} and more arguments of `work`. A small engine is
built as the trainer builds it, takes its steps, and is saved by the trainer's own save as a run
in OUT/LABEL. Rank 0 writes what the live engine held and answered to OUT/LABEL/live.pt. A
process of its own, because DeepSpeed's accelerator and process group are global.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from mc_ds.config.recipe import to_yaml
from mc_ds.console import has_native_threads, run_program
from mc_ds.model.build import build_lensnet
from mc_ds.training.checkpoint import CheckpointSaver
from mc_ds.training.engine.engine import build_engine, build_sharded_model
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.ranks.distributed import read_rank_environment, start_distributed
from tests.support.factories import mc_config, plan, run_config, tokens, wake
from tests.support.tiny_bundle import tiny_tokenizer

STEP = 2


def settings(stage, precision, accumulate, zero):
    """A DeepSpeed config as `resolve_deepspeed_config` derives it."""
    ours = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        **zero,
    }
    return {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": ours,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        **({"data_types": {"grad_accum_dtype": accumulate}} if accumulate else {}),
    }


def masters(engine):
    """What the optimizer holds of each parameter in float32, and what is in the module where
    that is all there is.
    """
    weights = {}
    for name, parameter in engine.module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        if (
            parameter.dtype == torch.bfloat16
            and parameter.requires_grad
            and (sharded or hasattr(parameter, "_hp_mapping"))
        ):
            master = safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                master = parameter.detach().clone()
        weights[name] = master.detach().clone()
    return weights


def whole(mc):
    """The plan of a plain language model: all tokens, one row."""
    starts = torch.arange(mc.seq_len)[None]
    return torch.zeros_like(starts), starts


def work(
    out,
    label,
    stage,
    precision,
    accumulate=None,
    tied=True,
    frozen=None,
    variants=3,
    max_lod=2,
    steps=STEP,
    zero=None,
):
    """One engine. `frozen` is the prefix of parameters that do not learn, `zero` changes the
    JSON's section.

    With one level GistNet has parameters of a single element, which two ranks cannot share.
    """
    mc = mc_config(num_random_variants=variants, max_lod=max_lod)
    config = run_config(mc, {"tie_embeddings": tied}, precision=precision, learning_rate=1e-2)
    config = config.model_copy(update={"name": label, "seed": 3})
    ds_config = settings(stage, precision, accumulate, zero or {})
    tokenizer = tiny_tokenizer()
    model = build_sharded_model(config, ds_config, vocab_size=tokenizer.vocab_size)
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)
    engine = build_engine(config, ds_config, model, torch.device("cpu"))
    rows = plan(config.mc, 1) if variants else whole(config.mc)
    for step in range(steps):
        engine.backward(engine(tokens(config.mc, 1, seed=step), *rows).loss)
        engine.step()
    run, lens = out / label, wake(build_lensnet(config)) if variants else None
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(to_yaml(config))
        tokenizer.save(run)
        figures = [
            {"step": 1, "val/loss": 9.5},
            {"step": STEP, "val/loss": 2.5, "train/loss": 1.5},
            {"step": 3, "val/loss": 0.5},
        ]
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in figures) + '{"step": 2, "val/lo'
        )
    facts = {
        "world_size": dist.get_world_size(),
        "zero_stage": stage,
        "sub_group_size": None,
        "config": config.model_dump(mode="json"),
        "requirements": {"tokenizer": tokenizer.sha256, "data": "gone"},
        "corpus": "of words",
    }
    lens_state = None if lens is None else {"lensnet": lens.state_dict()}
    watchdog = Watchdog(0, dist.get_rank(), run)
    saver = CheckpointSaver(run / "checkpoints", engine, keep_last=1, watchdog=watchdog)
    saver.begin(step=STEP, lens_state=lens_state, trainer_state=facts, background=False)
    saver.finish()
    weights = masters(engine)
    engine.eval()
    with torch.no_grad():
        output = engine(tokens(config.mc, 1), *rows)
    if dist.get_rank() == 0:
        live = {
            "weights": weights,
            "entry_nll": output.entry_nll,
            "row_scores": output.row_scores,
            "plan": rows,
        }
        torch.save(live, run / "live.pt")


def main(_: list[str]) -> int:
    """Do the work; return 0."""
    start_distributed(read_rank_environment())
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        work(Path(sys.argv[2]), **scenario)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    has_native_threads()
    run_program(main)
