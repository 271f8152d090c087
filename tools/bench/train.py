"""Times optimizer steps of a recipe on random tokens, on all ranks of the launcher.

Usage: torchrun --standalone --nproc_per_node 4 tools/bench/train.py \
           --config tools/bench/shapes/megacontext.yaml --json bench.jsonl

Accepts every option of launch/train.py. A step has `train.micro_batch_size` sequences per rank and
micro-step (and `train.global_batch_size` is set accordingly), so that the work per GPU does not
depend on their number. Steps use the trainer's code, without corpus, validation and checkpoints.
`--peer` instead times transformers' Llama of the same shape: with the same ZeRO config
(hugging_face), or under FSDP2 with compiled layers (fsdp2). Every step's results are read after the
next step has been launched, as the trainer does.

Rank 0 appends one JSON line: median milliseconds per step and phase, entries and tokens per second
and GPU, MFU, peak memory and its estimate by `--dry_run`, seconds of the parts of the start, and
versions.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.cli import load_config
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data import MicroBatchDataset, MicroStep, make_loader
from mc_ds.data.batch import Sample
from mc_ds.model.backbone import HeadOutput, LossHead
from mc_ds.model.build import build_lensnet
from mc_ds.training.assembly import assemble_runner
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.engine.engine import (
    build_engine,
    build_sharded_model,
    compile_lensnet,
    use_compilation,
)
from mc_ds.training.engine.host_copy import copy_to_host
from mc_ds.training.planning.estimate import memory_per_rank
from mc_ds.training.planning.work import parameter_counts, work_per_micro_step
from mc_ds.training.ranks.distributed import (
    RankEnvironment,
    device_type,
    read_rank_environment,
    start_distributed,
)
from mc_ds.training.run_state import versions
from mc_ds.training.step import StepRunner
from mc_ds.training.telemetry.timers import StepTimers

Mark = Callable[[str], None]
"""Notes the end of a part of the start."""

Reading = Callable[[], dict[str, float]]
"""Waits for a step, and returns its milliseconds by phase and its loss."""

Step = Callable[[int], Reading]
"""Launches optimizer step n."""


PARTS = {
    "step": "norm, clipping and AdamW are DeepSpeed's",
    "gradients": "gradients go to their partition through DeepSpeed's bucket",
    "loss": "logits are computed twice",
    "whole": "LensNet's blocks are compiled, not LensNet as a whole",
    "lens": "LensNet does not run",
}
"""Parts of the step that can be left out, and what happens then."""


class RandomTokens:
    """Source of random sequences, which depend only on their index."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index`, which is the same at every `stage`."""
        mc, vocab = self.config.mc, self.config.data.vocab_size
        tokens = np.random.default_rng(index).integers(0, vocab, mc.seq_len + 1)
        return Sample(tokens, np.ones(mc.horizon_tokens, dtype=np.float32))

    def epochs(self, samples: int) -> dict[str, float]:
        """Return an empty dict: there is no text."""
        return {}


def random_batches(
    config: RunConfig, sequences: int, *, rank: int = 0, world_size: int = 1, accumulation: int = 1
) -> MicroBatchDataset:
    """Return micro-batches of `sequences` random sequences and their variants."""
    return MicroBatchDataset(
        RandomTokens(config),
        config.mc,
        seed=config.seed,
        micro_batch_size=sequences,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation,
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most of repeated measurements."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the benchmark's options, and all others for the run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are appended, as a line"
    )
    parser.add_argument("--warmup", type=int, default=4, help="steps before timing starts")
    parser.add_argument("--steps", type=int, default=12, help="steps to time")
    parser.add_argument("--peer", choices=list(PEERS), help="time this instead of mc_ds")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps per step")
    parser.add_argument(
        "--synchronize",
        action="store_true",
        help="read every step's results before the next step is launched",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        choices=list(PARTS),
        default=[],
        help="time the step without these; for comparison: "
        + "; ".join(f"{name}: {effect}" for name, effect in PARTS.items()),
    )
    parser.add_argument(
        "--each",
        nargs="*",
        metavar="PARTS",
        default=[],
        help="then time it without each of these, which are parts joined by commas, in one process",
    )
    parser.add_argument(
        "--kernels", type=Path, help="profile two more steps, and write the kernels' times here"
    )
    parser.add_argument(
        "--inductor",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set an option of torch's compiler (torch._inductor.config); for comparison",
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=989.0,
        help="the GPU's peak for MFU; default: dense bf16 of an H100 or H200",
    )
    return parser.parse_known_args(argv)


class StartParts:
    """Seconds of the parts of the start of this process, by name, in their order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = psutil.Process().create_time()

    def mark(self, part: str) -> None:
        """Note that this part has ended."""
        now = time.time()
        self.seconds[part], self._last = now - self._last, now


def weak_scaling(
    config: RunConfig, world_size: int, steps: int, accumulation: int = 1
) -> RunConfig:
    """Return `config` with `accumulation` micro-steps per optimizer step and rank, for `steps`
    steps.
    """
    batch = config.train.micro_batch_size * world_size * accumulation
    train = config.train.model_copy(update={"global_batch_size": batch, "total_steps": steps})
    return config.model_copy(update={"train": train})


def ours(
    config: RunConfig,
    ds_config: dict[str, Any],
    env: RankEnvironment,
    device: torch.device,
    mark: Mark = lambda part: None,
) -> tuple[Step, StepRunner]:
    """Return the trainer's step, with model, engine, LensNet and loader as in the training loop,
    and its StepRunner.
    """
    model = build_sharded_model(config, ds_config, vocab_size=config.data.vocab_size)
    mark("model")
    engine = build_engine(config, ds_config, model, device)
    mark("engine")
    lensnet = build_lensnet(config)
    if lensnet is not None:
        lensnet = lensnet.to(device)
    runner = assemble_runner(config, ds_config, engine, lensnet, device)
    accumulation = ds_config["gradient_accumulation_steps"]
    batches = make_loader(
        random_batches(
            config,
            config.train.micro_batch_size,
            rank=env.rank,
            world_size=env.world_size,
            accumulation=accumulation,
        ),
        [
            MicroStep(n, micro, config.mc.wc_length_at(n), 0)
            for n in range(config.train.total_steps)
            for micro in range(accumulation)
        ],
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    mark("loader")

    def step(number: int) -> Reading:
        result = runner.run(number, batches, lens_start=0 if runner.lens is not None else None)
        return reading(result.losses, result.timers)

    return step, runner


@contextmanager
def left_out(parts: Collection[str], runner: StepRunner) -> Iterator[None]:
    """Leave out `PARTS` of the runner's step in the block."""
    zero, head, lens = runner.engine.optimizer, runner.engine.module.backbone.head, runner.lens
    changed: list[tuple[Any, str]] = []
    if "step" in parts:
        changed.append((zero, "step"))
    if "gradients" in parts:
        changed.append((zero, "reduce_independent_p_g_buckets_and_remove_grads"))
    if "loss" in parts:
        head.forward = partial(compute_logits_twice, head)
    if "lens" in parts:
        changed.append((runner, "lens"))
    if lens is not None and "whole" in parts and lens.lensnet.graphed is not None:
        changed.append((lens.lensnet, "graphed"))
        compile_lensnet(lens.lensnet, whole=False)
    before = [(owner, name, vars(owner).get(name)) for owner, name in changed]
    for owner, name in changed:
        if owner is zero:
            vars(owner).pop(name, None)  # DeepSpeed's method is below it
        else:
            setattr(owner, name, None)
    yield
    for owner, name, value in before:
        if value is not None:
            setattr(owner, name, value)
    vars(head).pop("forward", None)


def compute_logits_twice(
    head: LossHead, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> HeadOutput:
    """Return what the head returns, but compute gradients of logits in the backward pass."""
    output = LossHead.forward(head, hidden, labels)
    return output._replace(loss=(output.nll * weights).sum(), nll=output.nll.detach())


def kernel_table(step: Step, first: int, steps: int, device: torch.device) -> str:
    """Profile steps, and return a table of their kernels: ms and calls per step."""
    on_gpu, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    kind = activity.CUDA if on_gpu else activity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for number in range(first, first + steps):
            step(number)()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if on_gpu and event.device_type.name != "CUDA":
            continue  # a call of the CUDA runtime on the host
        took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        times.setdefault(event.name, []).append(took / 1e3)
    rows = sorted(times.items(), key=lambda row: -sum(row[1]))
    total = sum(sum(found) for found in times.values()) / steps
    lines = [f"{total:9.2f} ms of kernels per step"]
    for name, found in rows[:60]:
        lines.append(f"{sum(found) / steps:9.2f} ms {len(found) / steps:7.1f}x {name[:150]}")
    return "\n".join(lines) + "\n"


def reading(losses: list[torch.Tensor], timers: StepTimers | None = None) -> Reading:
    """Return the reading of a step: its timers, and the mean of its micro-steps' losses.

    The loss is copied to the host behind the step's work, so that reading it does not wait for
    what is launched later.
    """
    loss = copy_to_host(torch.stack(losses).mean())
    return lambda: {"loss": float(loss())} | (timers.read() if timers is not None else {})


def llama_config(config: RunConfig) -> Any:
    """Return transformers' config of a Llama with the shape of our backbone."""
    import transformers

    backbone = config.backbone
    return transformers.LlamaConfig(
        hidden_size=backbone.dim,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        num_key_value_heads=backbone.num_kv_heads,
        intermediate_size=backbone.ffn_dim,
        vocab_size=config.data.vocab_size,
        max_position_embeddings=config.mc.seq_len,
        tie_word_embeddings=backbone.tie_embeddings,
        use_cache=False,
    )  # the default attention is scaled_dot_product_attention


def peer_tokens(config: RunConfig, env: RankEnvironment, device: torch.device) -> torch.Tensor:
    """Return the random tokens [B, T] that a peer reads in every micro-step."""
    shape = (config.train.micro_batch_size, config.mc.seq_len)
    generator = torch.Generator().manual_seed(env.rank)
    return torch.randint(config.data.vocab_size, shape, generator=generator).to(device)


def about_peer(name: str, model: torch.nn.Module) -> dict[str, Any]:
    """Return facts about a peer for the results."""
    import transformers

    return {
        "peer": name,
        "peer_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "peer_version": transformers.__version__,
    }


def hugging_face(
    config: RunConfig, ds_config: dict[str, Any], env: RankEnvironment, device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """Return a step of transformers' Llama on sequences of T tokens, with the defaults of
    transformers and DeepSpeed, and facts about it for the results.
    """
    import transformers

    ds_config["zero_optimization"].pop("memory_efficient_linear", None)
    sharded = ds_config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=sharded):
        model = transformers.LlamaForCausalLM(llama_config(config))
    model.train()
    about = about_peer("hugging_face", model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.train.learning_rate, fused=device.type == "cuda"
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    tokens = peer_tokens(config, env, device)

    def step(number: int) -> Reading:
        losses = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return reading(losses)

    return step, about


def fsdp2(
    config: RunConfig, ds_config: dict[str, Any], env: RankEnvironment, device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """Return a step of transformers' Llama under FSDP2, and facts about it for the results.

    As torchtitan does it: float32 weights, bf16 computation and float32 reductions, each layer
    compiled and sharded on its own, final norm and head as one unit, a compiled loss, gradients
    clipped, fused AdamW.
    """
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    train = config.train
    with device:
        model: Any = transformers.LlamaForCausalLM(llama_config(config))
    model.train()
    about = about_peer("fsdp2", model)
    precision = torch.bfloat16 if train.precision_on(device.type) == "bf16" else torch.float32
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (env.world_size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32),
    }
    compiled = use_compilation(config, device)
    for layer in model.model.layers:
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, **options)
    if not config.backbone.tie_embeddings:
        fully_shard([model.model.norm, model.lm_head], **options, reshard_after_forward=False)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.weight_decay,
        fused=device.type == "cuda",
    )

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    loss_function: Callable[..., torch.Tensor] = torch.compile(loss_of) if compiled else loss_of
    tokens, accumulation = (
        peer_tokens(config, env, device),
        ds_config["gradient_accumulation_steps"],
    )

    def step(number: int) -> Reading:
        losses = []
        for micro in range(accumulation):
            model.set_requires_gradient_sync(micro + 1 == accumulation)
            loss = loss_function(model(input_ids=tokens).logits, tokens)
            (loss / accumulation).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return reading(losses)

    return step, about


PEERS = {"hugging_face": hugging_face, "fsdp2": fsdp2}


def measure(
    step: Step,
    warmup: int,
    steps: int,
    device: torch.device,
    *,
    first: int = 0,
    synchronize: bool = False,
) -> dict[str, Any]:
    """Run and time the steps from `first` on. Times are this rank's medians; memory is the maximum
    over ranks.

    A step's results are read once the next step is launched or, if `synchronize`, at once. A step
    lasts from the end of the one before to its own end, as the host sees them. `start_s` are the
    seconds from the start of this process to the end of its first step.
    """
    on_gpu = device.type == "cuda"
    times: list[float] = []
    parts: list[dict[str, float]] = []
    pending: list[Reading] = []
    for number in range(warmup + steps):
        # The first step compiles, and the first timed one starts with an idle device.
        alone = synchronize or number in (0, warmup - 1, warmup + steps - 1)
        if number == warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        pending.append(step(first + number))
        parts += [read() for read in pending[:-1]]
        del pending[:-1]
        if alone:
            parts.append(pending.pop()())
            if on_gpu:
                torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
        if number == 0:
            start_s = time.time() - psutil.Process().create_time()
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_gpu else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    timed, losses = times[warmup:], [part.pop("loss") for part in parts]
    return {
        "step_ms": statistics.median(timed),
        "step_ms_mean": statistics.mean(timed),
        "step_ms_min_max": [min(timed), max(timed)],
        "first_step_ms": times[0],
        "start_s": start_s,
        "phases_ms": {
            key: statistics.median(part[key] for part in parts[warmup:]) for key in parts[-1]
        },
        "peak_gib": int(peak) / 2**30,
        "losses": losses,
    }


def describe(
    config: RunConfig, ds_config: dict[str, Any], world_size: int, device: torch.device
) -> dict[str, Any]:
    """Return facts about config, hardware and versions, and the memory estimated by `--dry_run`."""
    stage, precision = (
        ds_config["zero_optimization"]["stage"],
        config.train.precision_on(device.type),
    )
    counts = parameter_counts(config)
    memory = memory_per_rank(config, counts, world_size, stage, precision=precision)
    on_gpu = device.type == "cuda"
    return {
        "run": config.name,
        "ranks": world_size,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "zero_stage": stage,
        "precision": "fp8" if config.train.precision == "fp8" else precision,
        "communication": ds_config.get("communication_data_type"),
        "parameters": counts,
        "expected_gib": sum(memory.values()) / 2**30,
        "versions": versions(),
    }


def throughput(
    config: RunConfig, step_ms: float, peak_tflops: float, accumulation: int = 1
) -> dict[str, float]:
    """Return the rates per rank, and MFU."""
    mc, batch = config.mc, config.train.micro_batch_size
    seconds = step_ms / 1e3 / accumulation  # of a micro-step
    length = mc.wc_length_at(0)
    return {
        "entries_per_s": batch * mc.rows_at(length) * length / seconds,
        "tokens_per_s": batch * mc.seq_len / seconds,
        "mfu": work_per_micro_step(config, length).model / seconds / (peak_tflops * 1e12),
    }


def main(argv: list[str]) -> int:
    """Run the benchmark on all ranks; return the exit code: 0 done, 2 invalid settings."""
    start = StartParts()
    start.mark("imports")
    args, options = parse(argv)
    cases = [args.without, *([*args.without, *case.split(",")] for case in args.each)]
    unknown = {part for case in cases for part in case} - set(PARTS)
    try:
        if unknown:
            raise ConfigError(f"--each: unknown parts {sorted(unknown)}: use {', '.join(PARTS)}")
        env = read_rank_environment()
        if env.world_size > 1 and any("step" in case for case in cases):
            raise ConfigError(
                f"the part step can be left out on one rank, not on {env.world_size}: there,"
                " gathers of weights wait for it"
            )
        count = len(cases) * (args.warmup + args.steps) + KERNEL_STEPS
        config = weak_scaling(load_config(options), env.world_size, count, args.accumulation)
        ds_config = resolve_deepspeed_config(config, env.world_size, device_type())
        device = start_distributed(env)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start.mark("process group")
    for key, _, value in (option.partition("=") for option in args.inductor):
        setattr(torch._inductor.config, key, json.loads(value))
    facts = describe(config, ds_config, env.world_size, device) | {"inductor": args.inductor}
    facts |= {"accumulation": args.accumulation, "synchronize": args.synchronize}
    runner, about = None, {"peer": None}
    if args.peer:
        step, about = PEERS[args.peer](config, ds_config, env, device)
    else:
        step, runner = ours(config, ds_config, env, device, start.mark)
    facts["start_parts_s"] = start.seconds
    out = args.json if env.is_main else None
    first = 0
    for case in cases:
        with left_out(case, runner) if runner is not None else nullcontext():
            figures = measure(
                step, args.warmup, args.steps, device, first=first, synchronize=args.synchronize
            )
            first += args.warmup + args.steps
        figures |= throughput(config, figures["step_ms"], args.peak_tflops, args.accumulation)
        record(out, facts | about | {"without": case} | figures)
    if args.kernels is not None:
        with left_out(args.without, runner) if runner is not None else nullcontext():
            table = kernel_table(step, first, KERNEL_STEPS, device)
        if env.is_main:
            args.kernels.write_text(table, encoding="utf-8")
    finish()
    return 0


KERNEL_STEPS = 2
"""Steps that `--kernels` profiles."""


def record(path: Path | None, result: dict[str, Any]) -> None:
    """Print a result and append it to `path`, on the rank that has one."""
    if path is not None:
        line = json.dumps(result)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)


def finish() -> None:
    """End the process group. A collective."""
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
