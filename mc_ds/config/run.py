"""`RunConfig`: all settings of a training run. The docstring below a field is its help text."""

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
from mc_ds.config.errors import ConfigError, Settings
from mc_ds.config.focus import FocusConfig, RetrievalConfig
from mc_ds.config.mc import MCConfig
from mc_ds.config.types import SwitchedShare, UserPath, absolute

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
"""Parts of a model that can be initialised from existing weights."""


class CurriculumConfig(Settings):
    """Controls when recall tasks advance to the next stage of `data.recall.facts_by_stage`: once
    the model answers the questions of the current one. Depends only on seed, step and the
    measurements.
    """

    spread: PositiveFloat = 0.4
    """Advance when the horizon loss differs between the variants of a sequence by more than this,
    in nats: the model then uses the facts that a variant shows.
    """
    horizon_loss: NonNegativeFloat = 0.0
    """Advance also when the training loss on the horizon, in nats per token, is below this; 0:
    never for this reason.
    """
    interval: PositiveInt = 50
    """Optimizer steps between measurements."""
    start_step: NonNegativeInt = 200
    """First step that is measured."""
    delay_steps: PositiveInt = 16
    """Steps until a new stage takes effect. Must exceed the steps that loaders prefetch."""


class TrainConfig(Settings):
    """Optimization of backbone and GistNet."""

    total_steps: PositiveInt = 1000
    """Optimizer steps of the run."""
    init_from: UserPath | None = None
    """Initial weights: a bundle, a run's folder or a checkpoint, with the same tokenizer. Ignored
    when a run resumes. Backbone shapes that are not set are taken from it.
    """
    init_parts: list[InitPart] = ["backbone", "gistnet", "lensnet"]
    """Parts loaded from `init_from`. GistNet or LensNet is initialised randomly if it is not
    listed here, missing there, or of another shape.
    """
    frozen: Literal["none", "backbone", "all"] = "none"
    """What is not trained: nothing, the backbone, or `all` but LensNet (backbone and GistNet then
    run no backward pass).
    """
    global_batch_size: PositiveInt = 8
    """Sequences B per optimizer step, over all ranks and micro-steps."""
    micro_batch_size: PositiveInt = 1
    """Sequences per rank and micro-step, each of G rows; gradient accumulation follows from it."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine decay, or constant with a linear decay at the end (WSD)."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""
    wsd_decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the run's steps in which WSD decays."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices; norms, biases, gains and level embeddings have none."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """First-moment decay of AdamW."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Second-moment decay of AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradient of backbone and GistNet together."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Engine precision; auto: bf16 on GPUs, fp32 on CPUs. fp8: bf16 with FP8 products in the
    decoder's projections, on GPUs of compute capability 8.9 or above.
    """
    activation_checkpointing: SwitchedShare = 0.0
    """Share of the blocks of the decoder, and of GistNet, that keep only their input and are
    recomputed in the backward pass: from 0 to 1 (false and true mean these). Saves memory; each
    recomputed block takes a third more operations.
    """
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of decoder, gist and lens blocks; auto: on GPUs only."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Capture each forward and backward as one CUDA graph; auto: for small models with ZeRO-1
    or 2.
    """
    loss_chunk_entries: PositiveInt = 4096
    """Entries per chunk of the cross-entropy; logits exist for one chunk at a time."""

    def precision_on(self, device_type: str) -> Literal["fp32", "bf16"]:
        """Return the engine's precision on `device_type` ("cuda" or "cpu"), with auto resolved. It
        is bf16 with FP8 products too.
        """
        if self.precision == "auto":
            return "bf16" if device_type == "cuda" else "fp32"
        return "fp32" if self.precision == "fp32" else "bf16"


class ValidationConfig(Settings):
    """Held-out loss during training."""

    eval_interval: NonNegativeInt = 100
    """Steps between validations, from before step 0 until after the last step; 0: none."""
    eval_sequences: PositiveInt = 8
    """Held-out sequences per validation, the same ones each time."""
    policies: list[PolicyName] = ["recency", "random", "lens", "blind", "full"]
    """Policies compared on held-out sequences of the mixture's task with the largest share, logged
    as `val/horizon_loss/{policy}`.
    """
    continuations: NonNegativeInt = 1
    """Held-out sequences that the model continues by a few tokens at each validation, to be read
    in the log; 0: none.
    """
    lens_patience: NonNegativeInt = 500
    """Steps of LensNet after which the run checks once that LensNet learns, and warns if
    `mc/preference_corr_mean` is not below that of its LOD-only control; 0: never.
    """


class CheckpointConfig(Settings):
    """Saving and keeping checkpoints."""

    interval: NonNegativeInt = 500
    """Steps between periodic checkpoints; 0: only the final one."""
    keep_last: PositiveInt = 2
    """Number of checkpoints kept; older ones are removed once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Never remove checkpoints whose step is a multiple of this; 0: no such exception."""
    background: bool = False
    """Write periodic checkpoints while training goes on, from a copy in host memory."""
    trusted: bool = False
    """Unpickle checkpoint files without restriction. They can then run any code: only for
    checkpoints that you made yourself.
    """


class HealthConfig(Settings):
    """Limits at which a run reports trouble or stops."""

    max_bad_steps: PositiveInt = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient, each of which is
    skipped.
    """
    loss_spike_sigmas: NonNegativeFloat = 6.0
    """Report a training loss that is this many standard deviations above its running mean; 0: no
    detection.
    """
    loss_spike_window: int = Field(default=200, ge=2)
    """Averaging window, in steps, of this (exponential) mean and deviation."""
    watchdog_timeout_s: NonNegativeFloat = 1200.0
    """Seconds without progress after which a rank exits with a message that names step and phase;
    0: no watchdog.
    """
    distributed_timeout_s: PositiveFloat = 1800.0
    """Seconds that ranks wait for each other, at the start and in every collective."""


class TelemetryConfig(Settings):
    """Where metrics are reported, besides `metrics.jsonl` in the run folder, which is always
    written.
    """

    wandb: bool = True
    """Mirror metrics to Weights & Biases, offline without an API key. Never prompts; its errors
    never stop the run.
    """
    wandb_project: str = "mc_ds"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group, e.g. of runs that differ in their seed; empty: none."""
    tensorboard: bool = False
    """Mirror metrics to TensorBoard, in `tensorboard/` of the run folder (extra `tensorboard`)."""
    progress: bool = True
    """Show progress on rank 0: a live view in a terminal, otherwise a line every ten seconds."""


def _run_name(name: str) -> str:
    """Return `name`, or raise ValueError if it is no valid name for a folder below `out_dir`."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not name.strip("."):
        raise ValueError(
            f"{name!r} is no folder name: use letters, digits, '.', '_' and '-', not only dots"
        )
    return name


def _step_and_number(text: str) -> str:
    """Return `text`, or raise ValueError if it is not STEP:N."""
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
    """DeepSpeed JSON file. The trainer sets batch size, precision and clipping from its own
    settings; a different value in the file is an error.
    """
    resume: UserPath = "auto"
    """`auto`: resume from the newest complete checkpoint of the run folder, if any. `never`: start
    over. A path: resume from that checkpoint or run. The last two apply to the first start only: if
    the command is repeated, the run resumes from its own newest checkpoint.
    """
    dry_run: bool = False
    """Print the resolved config, parameter counts, shapes and memory per rank, then exit."""
    ranks: PositiveInt | None = None
    """Number of ranks assumed by `dry_run` (default: those of this launch). Ignored otherwise."""
    debug: bool = False
    """Compare samples and variant plans between ranks before each micro-step, so that ranks that
    diverge stop with an error instead of hanging. Slow.
    """
    profile: Annotated[str, AfterValidator(_step_and_number)] | None = None
    """STEP:N: trace rank 0 for N steps after step STEP, write the trace for Perfetto, and print the
    time of each phase.
    """
    mc_log_lod_ascii: bool = False
    """At every validation, print each row's working context as one line of block symbols."""
    mc_log_lens_debug: bool = False
    """At every validation, print score statistics, advantages and correlations per variant."""
    backbone: BackboneConfig = BackboneConfig(preset="tiny")
    """The decoder."""
    mc: MCConfig = MCConfig()
    """Geometry, variants, GistNet, LensNet and their losses."""
    data: DataConfig = DataConfig()
    """Corpus and loader."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Stages of the recall tasks."""
    focus: FocusConfig = FocusConfig()
    """Focus allocator, for validation and evaluation."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Retrieval policies, for validation and evaluation."""
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
                f"data.recall.facts_by_stage = {self.data.recall.facts_by_stage} has several"
                " stages, but without variants (mc.num_random_variants = 0) only"
                " curriculum.horizon_loss can advance them: set it, or give one number of facts"
            )
        _check_lengths(mc, t.frozen)
        _check_start(t, mc)
        check_focus(self.focus, mc)
        if t.precision == "fp8":
            _check_fp8(self.backbone, mc, t)
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
                " watchdog reports what hangs, so it must act first"
            )
        width, heads = self.gist_width, self.gist_heads
        if mc.num_random_variants and (width % heads or width // heads % 2):
            raise ValueError(
                f"mc.gist_dim: GistNet's width {width} cannot be split into {heads} heads of even"
                " width: use a multiple of 64, or an even number below 128"
            )
        return self

    @property
    def profiled(self) -> tuple[int, int] | None:
        """`profile` as numbers: the step after which the trace begins, and its number of steps."""
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
        """Return the config with every path made absolute."""
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


def check_focus(focus: FocusConfig, mc: MCConfig) -> None:
    """Raise ConfigError for settings of contexts of tokens alone if the model reads covers."""
    for name in ("lens_blocks", "neighbours", "earlier_tokens"):
        if (value := getattr(focus, name)) and not mc.random_blocks:
            raise ConfigError(
                f"focus.{name} = {value} is for models that read tokens alone (mc.random_blocks >"
                " 0), and this one reads covers: leave it out"
            )


def _check_lengths(mc: MCConfig, frozen: str) -> None:
    """Raise ValueError for a W at which all variants of a sequence would be equal."""
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
        reason = None
        if length == coarsest:
            reason = "the coarsest length"
        elif mc.train_wc_length == mc.seq_len:
            reason = "the whole sequence"
        elif _all_at_one_level(mc, length):
            reason = "reached by only one context, with all nodes at one level"
        if reason is not None:
            raise ValueError(
                f"mc.{name} = {length} is {reason}, so all variants would be the same: use"
                f" another reachable length between {coarsest} and {mc.seq_len}, or"
                " num_random_variants = 0"
            )
    if frozen != "none" and mc.seq_len in stages:
        raise ValueError(
            f"train.frozen = {frozen!r} leaves nothing to learn in the stages of mc.wc_schedule"
            f" with W = T = {mc.seq_len}: remove these stages"
        )


def _all_at_one_level(mc: MCConfig, wc_length: int) -> bool:
    """Return whether the allocator can draw only one context of this length.

    That is so if it has the whole head (all tokens before the tail) at one level, with no finer
    node to trade for a coarser one.
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


FP8_MULTIPLE = 16
"""Every dimension of an FP8 matrix product is a multiple of this."""


def _check_fp8(backbone: BackboneConfig, mc: MCConfig, train: TrainConfig) -> None:
    """Raise ValueError for shapes that FP8 products cannot have."""
    sizes = {
        "backbone.dim": backbone.dim,
        "backbone.ffn_dim": backbone.ffn_dim,
        "the width of queries, keys and values": backbone.head_dim
        * (backbone.num_heads + 2 * backbone.num_kv_heads),
        **{
            f"the entries of a micro-step at W = {length}": train.micro_batch_size
            * mc.rows_at(length)
            * length
            for length in sorted(mc.wc_lengths)
        },
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ValueError(
                f"train.precision = fp8: {name} = {size} is not a multiple of {FP8_MULTIPLE}:"
                " change it, or use train.precision = bf16"
            )


def _check_start(train: TrainConfig, mc: MCConfig) -> None:
    """Raise ValueError if `init_from`, `init_parts` and `frozen` contradict each other."""
    if "backbone" not in train.init_parts:
        raise ValueError(
            f"train.init_parts = {train.init_parts} lacks backbone, whose embeddings GistNet and"
            " LensNet read: add it"
        )
    if mc.random_blocks and train.frozen != "all":
        raise ValueError(
            f"mc.random_blocks = {mc.random_blocks} makes variants of tokens alone, which train no"
            " GistNet: use train.frozen = all with train.init_from, or mc.random_blocks = 0"
        )
    if train.frozen == "none":
        return
    if train.init_from is None:
        raise ValueError(
            f"train.frozen = {train.frozen!r} would freeze random weights: give train.init_from, or"
            " use train.frozen = none"
        )
    if not mc.num_random_variants:
        raise ValueError(
            f"train.frozen = {train.frozen!r} leaves nothing to learn without variants: use"
            " train.frozen = none, or mc.num_random_variants >= 2"
        )
    if train.frozen == "all" and "gistnet" not in train.init_parts and not mc.random_blocks:
        raise ValueError(
            "train.frozen = 'all' would freeze a GistNet with random weights: add gistnet to"
            " train.init_parts, or use train.frozen = backbone"
        )
