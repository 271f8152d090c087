"""The training loop: builds the parts, runs steps, validates, saves checkpoints and reports.

`launch/train.py` calls `train(config)`.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mc_ds.config import RunConfig
from mc_ds.console.signals import StopSignals
from mc_ds.data import (
    Domain,
    RunData,
    check_shared_memory,
    prefetched_micro_steps,
)
from mc_ds.data.run_data import verify_content
from mc_ds.model.build import build_lensnet
from mc_ds.model.lensnet import LensNet
from mc_ds.tasks.mixture import make_source, num_stages, reading_lines
from mc_ds.training.assembly import assemble_runner
from mc_ds.training.batches import RankBatches
from mc_ds.training.checkpoint import CheckpointSaver, ResumePlan, load_checkpoint
from mc_ds.training.curriculum import Curriculum
from mc_ds.training.engine.deepspeed_config import (
    accumulation_steps,
    resolve_deepspeed_config,
)
from mc_ds.training.engine.engine import (
    build_engine,
    build_sharded_model,
    freeze,
    is_frozen,
)
from mc_ds.training.engine.initial import InitialWeights, load_from_checkpoint
from mc_ds.training.engine.preflight import check_beginning, with_initial_backbone
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.guards.launcher_guard import guard_against_orphaning
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.health import BadSteps
from mc_ds.training.planning.work import parameter_counts
from mc_ds.training.ranks.agreement import Request, StepAgreement, agree, agreed, gather
from mc_ds.training.ranks.distributed import (
    RankEnvironment,
    device_type,
    read_rank_environment,
    start_distributed,
)
from mc_ds.training.report import Reporter
from mc_ds.training.run_state import RunState, open_run_data, versions
from mc_ds.training.saves import Saves
from mc_ds.training.step import StepResult
from mc_ds.training.telemetry.banner import Facts, banner, this_place
from mc_ds.training.telemetry.profile import Profile
from mc_ds.training.telemetry.source import source_commit
from mc_ds.training.telemetry.throughput import Throughput
from mc_ds.training.validation import HeldOut, Validator
from mc_ds.weights.compatibility import changes


def train(config: RunConfig, launchers: Sequence[int] = ()) -> Path:
    """Train one run and return its folder. Call it on every rank.

    `launchers` are the process ids of the launchers; if one dies, this rank stops. Raises
    ConfigError for invalid input, and RunStopped, which has the exit code, if the run ends before
    its last step.
    """
    env = read_rank_environment()
    with ExitStack() as held, StopSignals(speaks=env.is_main) as stop:
        guard_against_orphaning(launchers, stop.request)
        try:
            trainer = Trainer(config, env, stop, held)
            trainer.fit()
        except RunStopped as stopped:
            if stopped.on_all_ranks:
                _leave_together()
            raise
        _leave_together()
        return trainer.folder


def _leave_together() -> None:
    """Wait for all ranks, then leave the process group. Without this wait, the first rank to exit
    would make the launcher kill the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _networks(
    config: RunConfig,
    ds_config: dict[str, Any],
    plan: ResumePlan | None,
    initial: InitialWeights | None,
    device: torch.device,
) -> tuple[Any, LensNet | None]:
    """Return the DeepSpeed engine and LensNet, with `initial` weights if given."""
    model = build_sharded_model(config, ds_config, vocab_size=config.data.vocab_size)
    if initial is not None:
        initial.load_model(model)
    elif plan is not None and plan.resized and config.train.frozen != "none":
        # The conversion to the universal format omits frozen parameters.
        load_from_checkpoint(
            model, plan.checkpoint, lambda name: is_frozen(name, config.train.frozen)
        )
    freeze(model, config.train.frozen)
    engine = build_engine(config, ds_config, model, device)
    lensnet = build_lensnet(config)
    if lensnet is not None:
        lensnet = lensnet.to(device)
        if initial is not None:
            initial.load_lensnet(lensnet)
    return engine, lensnet


class Trainer:
    """One run on one rank.

    Invalid settings raise ConfigError before the ranks connect; other errors are found before the
    run's folder is changed.
    """

    def __init__(
        self,
        config: RunConfig,
        env: RankEnvironment,
        stop: StopSignals | None = None,
        held: ExitStack | None = None,
    ) -> None:
        """Set up the run. Its folder stays locked until `held` is closed (if None: as long as the
        trainer exists).
        """
        self.env = env
        self.stop = stop or StopSignals()
        self.folder = Path(config.out_dir) / config.name
        config = with_initial_backbone(config, self.folder)
        self.watchdog = Watchdog(config.health.watchdog_timeout_s, env.rank, self.folder)
        ds_config = resolve_deepspeed_config(config, env.world_size, device_type())
        self.curriculum = Curriculum(config.curriculum, num_stages=num_stages(config))
        accumulation = accumulation_steps(config, env.world_size)
        self.curriculum.check_prefetch(
            prefetched_micro_steps(config.data.num_workers) / accumulation
        )
        check_beginning(config, self.folder)
        with self.stop.ending_at_once("the run ends during data preparation; nothing was changed"):
            data = open_run_data(config.data, verify=env.local_rank == 0)
        self.config = config = config.with_vocabulary(data.tokenizer.vocab_size)
        self.train_source = make_source(config, data, data.train)
        if env.is_main:
            for line in reading_lines(config, data, self._epochs(config.train.total_steps)):
                print(line, flush=True)
        held_out = HeldOut.of(config, data)
        self.device = device = start_distributed(env, timeout_s=config.health.distributed_timeout_s)
        agreed(
            lambda: check_shared_memory(
                config.mc,
                micro_batch_size=config.train.micro_batch_size,
                num_workers=config.data.num_workers,
                processes=env.local_world_size,
            )
        )
        if config.data.datasets and config.data.verify == "content":
            agreed(lambda: verify_content(config.data) if env.local_rank == 0 else None)
        self.run_state = RunState(self.folder, config, ds_config, data, device.type)
        plan, initial = self.run_state.open(held or ExitStack())
        if plan is not None and plan.converted:
            ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
        self.engine, lensnet = _networks(config, ds_config, plan, initial, device)
        self.batches = RankBatches(
            self.train_source, config, env, self.curriculum, accumulation, device
        )
        traced = config.profiled if env.is_main else None
        self.profile = Profile(traced, self.folder, device, self.watchdog.mark)
        self.runner = assemble_runner(
            config, ds_config, self.engine, lensnet, device, self.profile.mark
        )
        self.lens, self.controller = self.runner.lens, self.runner.controller
        if self.lens is not None and initial is not None:
            self.lens.prepared = self.lens.lensnet.has_learnt()
        self.validator = Validator(
            config,
            held_out,
            self.engine,
            self.controller,
            device,
            self.watchdog.mark,
        )
        self.throughput = Throughput(config, accumulation, device)
        self.bad_steps = BadSteps(self.folder, config.health)
        self.agreement = StepAgreement(device)
        self.runner.before_optimizers = lambda: self.agreement.send(
            self._request(), writing=self.saves.writing
        )
        self.step = self._restore(plan) if plan is not None else 0
        self.run_state.claim(plan)
        self.reporter = agreed(
            lambda: Reporter(config, self.folder, enabled=env.is_main, start_step=self.step),
            doing="the run folder",
        )
        self.saves = self._make_saves()
        if plan is not None:
            self.reporter.load_state_dict(plan.trainer)
            start = self._resume_lines(plan)
        else:
            start = ["begins at step 0" if initial is None else initial.line(config)]
        self.reporter.text(self._banner(data, ds_config, start))

    def _make_saves(self) -> Saves:
        """Return what saves this run's checkpoints."""
        settings = self.config.checkpoint
        saver = CheckpointSaver(
            self.run_state.checkpoints,
            self.engine,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            watchdog=self.watchdog,
            ranks_per_host=self.env.local_world_size,
            check_owner=self.run_state.check_owner,
        )
        mark, background = self.profile.mark, settings.background
        return Saves(saver, self._state, self.reporter, mark, background=background)

    def fit(self) -> None:
        """Run the remaining steps; validate before the first, at intervals and after the last.

        Raises RunStopped on all ranks if the run was asked to stop, after saving a checkpoint, or
        if it cannot continue.
        """
        code = ExitCode.FAILED
        try:
            with self.watchdog, self.saves.published_at_the_end():
                self._fit()
            code = ExitCode.DONE
        except RunStopped as stopped:
            code = stopped.code
            self.reporter.log([str(stopped)])
            raise
        finally:
            self.reporter.close(exit_code=0 if code is ExitCode.REQUEUE else code)

    def _fit(self) -> None:
        total, every = self.config.train.total_steps, self.config.validation.eval_interval
        batches = self.batches.load(range(self.step, total))
        self._stop_before_training()
        if every and self.step == 0:
            self._validate()
            self._stop_before_training()
        while self.step < total:
            started = time.perf_counter()
            self.watchdog.step = self.step
            self.reporter.text(self.profile.between(self.step))
            self._prepare_lens()
            result = self.runner.run(self.step, batches, lens_start=self._lens_start())
            self.profile.mark("between steps")
            self.bad_steps.check(self.step, result)
            self.step += 1
            if self.curriculum.wants(self.step) and self._loss_is_representative():
                record = result.statistics.record()
                self.curriculum.observe(
                    self.step, record.get("mc/horizon_spread", 0.0), record["train/horizon_loss"]
                )
            self.reporter.step(self.step, result, self._counts(result, started))
            last = self.step == total
            request, writing = self.agreement.read()
            if not writing:
                self.saves.publish()
            if every and (self.step % every == 0 or last):
                self._validate()
                request = max(request, self._request_now())
            if request is Request.FAIL:
                agree(self.reporter.error)
            interval = self.config.checkpoint.interval
            if last or request is Request.STOP:
                checkpoint = self.saves.save()
            elif interval and self.step % interval == 0:
                self.saves.save_periodically()
            if request is Request.STOP and not last:
                self._stop(f"after step {self.step}: {checkpoint} is complete")
        self.reporter.text(self.profile.between(self.step))

    def _stop_before_training(self) -> None:
        """Raise RunStopped if the run was asked to stop before its first step."""
        if self.step < self.config.train.total_steps and self._request_now() is Request.STOP:
            self._stop("before its first step: there was nothing to save")

    def _stop(self, when: str) -> NoReturn:
        """Raise RunStopped on all ranks, with the reason of the lowest rank that has one."""
        reasons = enumerate(gather(self._stop_reason()))
        rank, (reason, code) = next((rank, given) for rank, given in reasons if given is not None)
        where = f"rank {rank}: " if code is ExitCode.LOADER else ""
        raise RunStopped(f"{where}stopped by {reason} {when}", code, on_all_ranks=True)

    def _stop_reason(self) -> tuple[str, ExitCode] | None:
        """Return why this rank wants the run to stop, with the exit code; None if it does not."""
        if self.batches.failure is not None:
            return f"a failed data loader ({self.batches.failure})", ExitCode.LOADER
        return None if self.stop.reason is None else (self.stop.reason, ExitCode.REQUEUE)

    def _request_now(self) -> Request:
        """Reduce the requests of all ranks and return the result. A collective that waits."""
        self.agreement.send(self._request())
        return self.agreement.read().request

    def _request(self) -> Request:
        """Return this rank's request for the next step boundary."""
        if self.reporter.error is not None:
            return Request.FAIL
        return Request.STOP if self._stop_reason() is not None else Request.GO_ON

    def _loss_is_representative(self) -> bool:
        """Return whether the curriculum may use the last step's losses.

        It ignores uncompressed steps (W = T): they read every fact in full, so that their loss says
        nothing about compressed contexts.
        """
        return self.config.mc.num_random_variants == 0 or self.config.mc.varies_at(self.step - 1)

    def _lens_start(self) -> int | None:
        """Return the step at which LensNet starts; None if there is no LensNet, or if it waits for
        the curriculum's end.
        """
        start = self.config.mc.lens_start_step
        if self.lens is None:
            return None
        return self.curriculum.end_step() if start == "curriculum_end" else start

    @torch.no_grad()
    def _prepare_lens(self) -> None:
        """Before LensNet's first step, whiten a new LensNet's index vectors with the embeddings of
        that step's sequences.
        """
        start = self._lens_start()
        varies = self.config.mc.varies_at(self.step)
        if (
            self.lens is None
            or self.lens.prepared
            or start is None
            or self.step < start
            or not varies
        ):
            return
        if not (self.config.mc.lens_index and self.config.mc.lens_index_white):
            self.lens.prepared = True
            return
        self.watchdog.mark("LensNet's preparation")
        self.engine.eval()
        self.lens.prepare(
            self.engine(batch.tokens.to(self.device)).lod0 for batch in self.batches.of(self.step)
        )
        self.engine.train()

    def _state(self) -> dict[str, Any]:
        """Return the arguments of `CheckpointSaver.begin` for the current step."""
        return {
            "step": self.step,
            "lens_state": self.lens.state_dict() if self.lens is not None else None,
            "trainer_state": {
                **self.run_state.facts(),
                "lensnet_calls": self.controller.training_calls,
                "val_lensnet_calls": self.controller.inference_calls,
                "curriculum": self.curriculum.state_dict(),
                "bad_steps_in_a_row": self.bad_steps.in_a_row,
                **self.reporter.state_dict(),
            },
        }

    def _restore(self, plan: ResumePlan) -> int:
        """Restore engine, LensNet, curriculum and counters from a checkpoint; return its step."""
        state, lens_state = plan.trainer, load_checkpoint(plan, self.engine, self.device)
        if self.lens is not None and lens_state is not None:
            self.lens.load_state_dict(lens_state)
        self.curriculum.load_state_dict(state["curriculum"])
        self.controller.training_calls = state["lensnet_calls"]
        self.controller.inference_calls = state["val_lensnet_calls"]
        self.bad_steps.in_a_row = int(state["bad_steps_in_a_row"])
        return int(state["step"])

    def _banner(self, data: RunData, ds_config: dict[str, Any], start: list[str]) -> list[str]:
        """Return the lines that describe the run at its start. A collective."""
        places = gather(this_place(self.device))
        if not self.env.is_main:
            return []
        facts = Facts(
            folder=self.folder,
            places=places,
            zero_stage=ds_config["zero_optimization"]["stage"],
            precision=self.config.train.precision_on(self.device.type),
            versions=versions(),
            commit=source_commit(),
            parameters=parameter_counts(self.config),
            corpus=data.title,
            tokens=(_tokens(data.train), _tokens(data.val)),
            epochs=self._epochs(self.config.train.total_steps),
            start=start,
        )
        return banner(self.config, facts)

    def _resume_lines(self, plan: ResumePlan) -> list[str]:
        """Return lines that say where the run resumes, and which settings have changed."""
        line = f"resumes after step {self.step} from {plan.checkpoint}"
        if self.config.train.init_from:
            line += f" (train.init_from = {self.config.train.init_from} is ignored)"
        stored = self.run_state.config.model_dump(mode="json")
        changed = changes(plan.trainer["config"], stored)
        lines = [line, *(f"  changed: {setting}" for setting in changed)]
        if self.step >= self.config.train.total_steps:
            lines.append(
                f"all {self.config.train.total_steps} steps are done, nothing is left to train: to"
                " go on, raise train.total_steps; for another run, use another --name"
            )
        return lines

    def _validate(self) -> None:
        """Validate, report the results, and print contexts and scores if the config says so."""
        self.profile.mark("validation")
        found = self.validator.run()
        self.reporter.validation(self.step, found, self.validator.continuations())
        self.reporter.text(self.validator.text_lines())

    def _epochs(self, steps: int) -> dict[str, float]:
        """Return, for each named part of the data, how often `steps` steps read it."""
        return self.train_source.epochs(steps * self.config.train.global_batch_size)

    def _counts(self, result: StepResult, started: float) -> dict[str, float]:
        """Return the step's metrics that come from the host: throughput, memory and totals."""
        seconds, train = time.perf_counter() - started, self.config.train
        tokens = self.step * train.global_batch_size * self.config.mc.seq_len
        rates = self.throughput.metrics(self.config.mc.wc_length_at(self.step - 1), seconds)
        peak = peak_memory(self.device)
        epochs = {f"data/epoch/{name}": count for name, count in self._epochs(self.step).items()}
        return (result.host | self.saves.metrics() | rates | epochs) | {
            "train/data_stage": float(self.curriculum.stage_at(self.step - 1)),
            "train/peak_memory_gb": peak / 1e9,
            "train/tokens": float(tokens),
            "mc/lensnet_calls": float(self.controller.training_calls),
        }


def _tokens(domains: Sequence[Domain]) -> int:
    """Return the number of tokens in all domains."""
    return sum(len(domain.shards) for domain in domains)


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes allocated on a GPU; 0 on a CPU.

    Reads one counter directly: torch.cuda.max_memory_allocated takes 0.4 ms per step, because it
    flattens all counters.
    """
    if device.type != "cuda":
        return 0
    return torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
