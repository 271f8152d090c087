"""`RunConfig`: all settings of a training run, in one validated model. The docstring below a field
documents it.
"""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mc_ds.config.backbone import BackboneConfig
from mc_ds.config.data import RECALL_TASKS, DataConfig
from mc_ds.config.errors import Settings
from mc_ds.config.focus import FocusConfig, RetrievalConfig
from mc_ds.config.mc import MCConfig
from mc_ds.config.types import UserPath, absolute

PolicyName = Literal[
    "recency",
    "random",
    "uniform",
    "lens",
    "blind",
    "other_question",
    "oracle",
    "bm25",
    "ngram",
    "dense",
    "attention",
    "full",
    "tail",
]
"""Ways to choose a working context (mc_ds/focus/policies.py)."""
InitPart = Literal["backbone", "gistnet", "lensnet"]
"""Parts of a model whose weights a run may start from."""


class CurriculumConfig(Settings):
    """When the data advances to its next stage: once recall has begun. Stages depend only on the
    seed, the step and the measurements.
    """

    spread: PositiveFloat = 0.4
    """Spread of the horizon scores over a sequence's variants, in nats, above which the next stage
    begins.
    """
    horizon_loss: NonNegativeFloat = 0.0
    """Training loss on the horizon, in nats per token, below which the next stage begins too; 0:
    only the spread counts.
    """
    interval: PositiveInt = 50
    """Optimizer steps between measurements of the spread."""
    start_step: NonNegativeInt = 200
    """First step that is measured."""
    delay_steps: PositiveInt = 16
    """Steps after which a new stage takes effect; more than loader processes prefetch."""


class TrainConfig(Settings):
    """Optimization of backbone and GistNet."""

    total_steps: PositiveInt = 1000
    """Optimizer steps of the run."""
    init_from: UserPath | None = None
    """Weights to start from: a bundle, a run's folder or a checkpoint, with the same tokenizer. Not
    read when a run resumes. Gives the shapes of the backbone that are not set.
    """
    init_parts: list[InitPart] = ["backbone", "gistnet", "lensnet"]
    """Parts taken from `init_from`. GistNet and LensNet start fresh where they are not named, are
    missing, or have another shape.
    """
    frozen: Literal["none", "backbone", "all"] = "none"
    """What is frozen: nothing, the backbone, or `all` but LensNet: backbone and GistNet then only
    run forward.
    """
    global_batch_size: PositiveInt = 8
    """Sequences B per optimizer step, over all ranks and micro-steps."""
    micro_batch_size: PositiveInt = 1
    """Sequences per rank and micro-step (each makes G rows); accumulation steps are derived."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine decay, or constant with a linear decay at the end (WSD)."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""
    wsd_decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the run that WSD spends decaying."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices (norms, biases, gains and level embeddings have none)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """First-moment decay of AdamW."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Second-moment decay of AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Norm to which the gradient of backbone and GistNet together is clipped."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Engine precision; auto: bf16 on GPUs, fp32 on CPUs."""
    activation_checkpointing: bool = False
    """Recompute decoder blocks in the backward pass (non-reentrant)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of decoder, gist and lens blocks; auto: on GPUs only."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Launch each forward and backward as one CUDA graph; auto: for small models under ZeRO-1 or
    2.
    """
    loss_chunk_entries: PositiveInt = 4096
    """Entries per chunk of the cross-entropy; logits exist for one chunk at a time."""

    def precision_on(self, device_type: str) -> Literal["fp32", "bf16"]:
        """Return the engine's precision on a device type ("cuda", "cpu"), auto resolved."""
        if self.precision == "auto":
            return "bf16" if device_type == "cuda" else "fp32"
        return self.precision


class ValidationConfig(Settings):
    """Held-out loss during training."""

    eval_interval: NonNegativeInt = 100
    """Steps between validations; the first is before step 0, the last after the final step. 0:
    none.
    """
    eval_sequences: PositiveInt = 8
    """Held-out sequences per validation, the same ones each time."""
    policies: list[PolicyName] = ["recency", "random", "lens", "blind", "full"]
    """Policies compared on held-out sequences of the largest task of the mixture, logged as
    `val/horizon_loss/{policy}`.
    """
    continuations: NonNegativeInt = 1
    """Held-out sequences that the model continues by a few tokens at each validation, to be read
    in the log; 0: none.
    """
    lens_patience: NonNegativeInt = 500
    """Steps of LensNet after which the run checks it, once, and warns where
    `mc/preference_corr_mean` is not below its LOD-only control; 0: never.
    """


class CheckpointConfig(Settings):
    """Saving and keeping checkpoints."""

    interval: NonNegativeInt = 500
    """Steps between periodic checkpoints; 0: only the final one."""
    keep_last: PositiveInt = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are a multiple of this are never removed; 0: none."""
    trusted: bool = False
    """Resume even from files that hold more than this trainer writes. Such files can run any code:
    only for checkpoints that you made yourself.
    """


class HealthConfig(Settings):
    """Limits at which a run reports trouble or stops."""

    max_bad_steps: PositiveInt = 10
    """Number of consecutive optimizer steps with a non-finite loss or gradient after which the run
    stops. Each of them is skipped.
    """
    loss_spike_sigmas: NonNegativeFloat = 6.0
    """A training loss this many standard deviations above its running mean is reported as a
    spike; 0: no detection.
    """
    loss_spike_window: int = Field(default=200, ge=2)
    """Steps over which this mean and deviation are averaged (exponentially)."""
    watchdog_timeout_s: NonNegativeFloat = 1200.0
    """Seconds without progress after which a rank ends itself, naming step and phase; 0: no
    watchdog.
    """
    distributed_timeout_s: PositiveFloat = 1800.0
    """Seconds that ranks wait for each other, at the start and in every collective."""


class TelemetryConfig(Settings):
    """What is reported where. `metrics.jsonl` in the run folder is always written and is the
    record.
    """

    wandb: bool = True
    """Mirror metrics to Weights & Biases: offline where there is no key; it never prompts and never
    fails the run.
    """
    wandb_project: str = "mc_ds"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group, e.g. of runs that differ in their seed; empty: none."""
    tensorboard: bool = False
    """Mirror metrics to TensorBoard, in `tensorboard/` of the run folder (extra `tensorboard`)."""
    progress: bool = True
    """Progress on rank 0's screen: a live view in a terminal, else a line every ten seconds."""


def _run_name(name: str) -> str:
    """Return `name` if a folder directly below `out_dir` can have it, else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not name.strip("."):
        raise ValueError(
            f"{name!r} cannot name a folder: use letters, digits, '.', '_' and '-', not only dots"
        )
    return name


def _step_and_number(text: str) -> str:
    """Return what says after which step a trace begins, and of how many steps it is."""
    if not re.fullmatch(r"\d+:[1-9]\d*", text):
        raise ValueError(f"{text!r} should be STEP:N, e.g. 100:5 for five steps after step 100")
    return text


class RunConfig(Settings):
    """One training run."""

    name: Annotated[str, AfterValidator(_run_name)] = "run"
    """Name of the run; its folder is `out_dir/name`."""
    out_dir: UserPath = "runs"
    """Folder of all runs."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, sampling and variants."""
    deepspeed_config: UserPath = "ds_configs/zero3.json"
    """DeepSpeed JSON. Batch size, precision and clipping come from this config; a contradiction is
    an error.
    """
    resume: UserPath = "auto"
    """`auto`: resume from the newest whole checkpoint of the run folder, if any. `never`: start
    over. A path: resume from that checkpoint or run. The last two apply to the first start only:
    the same command again resumes from what the run has saved since.
    """
    dry_run: bool = False
    """Print the resolved config, parameter counts, shapes and memory per rank, and start
    nothing.
    """
    ranks: PositiveInt | None = None
    """Ranks that `dry_run` reckons with (default: those of this launch); a run takes no notice."""
    debug: bool = False
    """Every rank checks its neighbour's samples and variant plans before each micro-step, so that
    ranks that diverge stop with an error instead of hanging. Slow.
    """
    profile: Annotated[str, AfterValidator(_step_and_number)] | None = None
    """STEP:N traces rank 0 for N steps after step STEP, for Perfetto, and prints what its phases
    cost.
    """
    mc_log_lod_ascii: bool = False
    """Print each row's working context as one line of block symbols, at every validation."""
    mc_log_lens_debug: bool = False
    """Print per-variant score statistics, advantages and correlations, at every validation."""
    backbone: BackboneConfig = BackboneConfig(preset="tiny")
    """The decoder."""
    mc: MCConfig = MCConfig()
    """Geometry, variants, GistNet, LensNet and their losses."""
    data: DataConfig = DataConfig()
    """Corpus and loader."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Stages of the data."""
    focus: FocusConfig = FocusConfig()
    """The focus allocator of validation and evaluation."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Retrieval policies of validation and evaluation."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out evaluation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Reporting."""
    health: HealthConfig = HealthConfig()
    """Bad steps, loss spikes, hangs."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        t, mc = self.train, self.mc
        staged = RECALL_TASKS & self.data.tasks.keys() and len(self.data.recall.facts_by_stage) > 1
        if mc.num_random_variants == 0 and staged and not self.curriculum.horizon_loss:
            raise ValueError(
                f"data.recall.facts_by_stage = {self.data.recall.facts_by_stage} has stages that"
                " begin by the spread over variants, and num_random_variants = 0 has none: give one"
                " number of facts, or curriculum.horizon_loss"
            )
        _check_lengths(mc, t.frozen)
        _check_start(t, has_variants=mc.num_random_variants > 0)
        if t.global_batch_size % t.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {t.global_batch_size} is not a multiple of"
                f" train.micro_batch_size = {t.micro_batch_size}"
            )
        if t.warmup_steps >= t.total_steps:
            raise ValueError(
                f"train.warmup_steps = {t.warmup_steps} must be below train.total_steps ="
                f" {t.total_steps}"
            )
        if self.profiled and sum(self.profiled) > t.total_steps:
            raise ValueError(
                f"profile = {self.profile!r} ends at step {sum(self.profiled)}, beyond"
                f" train.total_steps = {t.total_steps}: profile earlier steps"
            )
        health = self.health
        if health.watchdog_timeout_s >= health.distributed_timeout_s:
            raise ValueError(
                f"health.watchdog_timeout_s = {health.watchdog_timeout_s:g} must be below"
                f" health.distributed_timeout_s = {health.distributed_timeout_s:g}: only the"
                " watchdog names what hangs, so it must be first"
            )
        width, heads = self.gist_width, self.gist_heads
        if mc.num_random_variants and (width % heads or width // heads % 2):
            raise ValueError(
                f"mc.gist_dim: GistNet's width {width} does not divide into {heads} heads of even"
                " width: use a multiple of 64, or an even number below 128"
            )
        return self

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The step after which a trace begins, and its number of steps."""
        if self.profile is None:
            return None
        first, steps = self.profile.split(":")
        return int(first), int(steps)

    @property
    def gist_width(self) -> int:
        """Width of GistNet's blocks."""
        return self.mc.gist_dim or self.backbone.dim

    @property
    def gist_heads(self) -> int:
        """Attention heads of GistNet's blocks: one per 64 channels."""
        return max(1, self.gist_width // 64)

    def with_absolute_paths(self) -> "RunConfig":
        """Return the config with absolute paths, valid in any working directory."""
        names = ("root", "cache_dir", "tokenizer")
        datasets = {
            name: [
                dataset.model_copy(update={"path": absolute(dataset.path)})
                for dataset in getattr(self.data, name)
            ]
            for name in ("datasets", "validation")
        }
        data = self.data.model_copy(
            update={**datasets, **{name: absolute(getattr(self.data, name)) for name in names}}
        )
        train = self.train.model_copy(update={"init_from": absolute(self.train.init_from)})
        paths = {name: absolute(getattr(self, name)) for name in ("out_dir", "deepspeed_config")}
        if self.resume not in ("auto", "never"):
            paths["resume"] = absolute(self.resume)
        return self.model_copy(update={**paths, "data": data, "train": train})

    def with_vocabulary(self, size: int) -> "RunConfig":
        """Return the config with `data.vocab_size` set to the size of the tokenizer in use."""
        return self.model_copy(update={"data": self.data.model_copy(update={"vocab_size": size})})


def _check_lengths(mc: MCConfig, frozen: str) -> None:
    """Raise ValueError for lengths of working contexts at which all variants would be equal."""
    if mc.num_random_variants == 0:
        return
    coarsest, stages = (
        mc.geometry.coarsest_length,
        [stage.train_wc_length for stage in mc.wc_schedule],
    )
    for name, length in [
        ("train_wc_length", mc.train_wc_length),
        *(("wc_schedule: train_wc_length", length) for length in stages),
    ]:
        what = None
        if length == coarsest:
            what = "the coarsest cover"
        elif mc.train_wc_length == mc.seq_len:
            what = "the whole sequence"
        elif _all_at_one_level(mc, length):
            what = "reached by one cover only, all at one level"
        if what is not None:
            raise ValueError(
                f"mc.{name} = {length} is {what}, so that all variants would be the same: use"
                f" another reachable length between {coarsest} and {mc.seq_len}, or"
                " num_random_variants = 0"
            )
    if frozen != "none" and mc.seq_len in stages:
        raise ValueError(
            f"train.frozen = {frozen!r} leaves nothing to learn in stages of mc.wc_schedule with"
            f" all {mc.seq_len} tokens: leave them out"
        )


def _all_at_one_level(mc: MCConfig, wc_length: int) -> bool:
    """Return whether the allocator can draw only one cover of this length: the whole head at one
    level, with no finer node to trade for a coarser one.
    """
    units, level_units, (_, blocks, *_) = mc.geometry.units(wc_length), 0, mc.geometry.head_nodes
    for level, nodes in enumerate(mc.geometry.head_nodes[1 : mc.max_lod], start=1):
        level_units += nodes
        if units == level_units:
            is_one_parent = nodes == mc.block_size and blocks == nodes * mc.block_size ** (
                level - 1
            )
            return is_one_parent or mc.training_lod2_probability == 0
    return False


def _check_start(train: TrainConfig, *, has_variants: bool) -> None:
    """Raise ValueError where the parts to start from and the frozen parts contradict each other."""
    if "backbone" not in train.init_parts:
        raise ValueError(
            f"train.init_parts = {train.init_parts}: GistNet and LensNet read the backbone's"
            " embeddings, so name backbone too"
        )
    if train.frozen == "none":
        return
    if train.init_from is None:
        raise ValueError(
            f"train.frozen = {train.frozen!r} would keep random weights: give train.init_from, or"
            " use frozen = none"
        )
    if not has_variants:
        raise ValueError(
            f"train.frozen = {train.frozen!r} leaves nothing to learn without variants: use frozen"
            " = none, or mc.num_random_variants >= 2"
        )
    if train.frozen == "all" and "gistnet" not in train.init_parts:
        raise ValueError(
            "train.frozen = 'all' would keep a GistNet with random weights: name gistnet in"
            " train.init_parts, or use frozen = backbone"
        )
