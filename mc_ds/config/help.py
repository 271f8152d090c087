"""`--help`: one screen with the settings that matter, `--help SECTION` one section in full,
`--help-all` everything.
"""

import json
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from mc_ds.config.errors import ConfigError, field_paths, suggestion
from mc_ds.config.run import RunConfig

MATTER = {
    "name": "the run's folder is out_dir/name",
    "out_dir": "folder of all runs",
    "resume": "auto, never, or a checkpoint's or run's path",
    "deepspeed_config": "how state is sharded: ds_configs/zero3.json",
    "seed": "of initialisation, sampling and variants",
    "backbone.preset": "tiny, 124m, 360m, 1b, 8b, 70b; or a shape",
    "data.source": "stdlib (Python's own source) or files",
    "data.root": "folder of text files, for data.source files",
    "data.tasks": "mixture of tasks, e.g. '{\"recall\": 1}'",
    "data.tokenizer": "folder of a tokenizer; else one is trained",
    "data.vocab_size": "pieces of the tokenizer that is trained",
    "mc.seq_len": "tokens T of a training sequence",
    "mc.train_wc_length": "entries W that the model reads of them",
    "mc.block_size": "tokens per gist, K",
    "mc.max_lod": "levels of gists",
    "mc.num_random_variants": "variants per sequence; 0: a plain LM",
    "mc.recent_tokens": "last tokens, always read in full",
    "mc.lens_start_step": "when LensNet starts, or curriculum_end",
    "train.total_steps": "optimizer steps",
    "train.global_batch_size": "sequences per step, over all ranks",
    "train.micro_batch_size": "sequences per rank and micro-step",
    "train.learning_rate": "peak; LensNet's own is mc.lens_lr",
    "train.warmup_steps": "steps of linear warm-up",
    "train.init_from": "a bundle, run or checkpoint to start from",
    "train.frozen": "what does not learn: none, backbone, all",
    "validation.eval_interval": "steps between validations; 0: none",
    "validation.eval_sequences": "held-out sequences, the same each time",
    "checkpoint.interval": "steps between checkpoints; 0: only the last",
    "telemetry.wandb": "mirror metrics to Weights & Biases",
    "dry_run": "print parameters and memory, start nothing",
}
"""The settings of the short help, in a few words each; `--help SECTION` has their whole text."""

SECTIONS = [
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]
WIDTH = 79
LABEL_WIDTH = 31
"""Of a name and its default in the short help; with a longer default the name stands alone."""


def short_help(prog: str) -> str:
    """Return the help of one screen: usage, the settings that matter with their defaults, and
    where the rest is.
    """
    fields = field_paths(RunConfig)
    labels = {name: f"--{name} {_default(fields[name])}" for name in MATTER}
    labels |= {name: f"--{name}" for name, label in labels.items() if len(label) > LABEL_WIDTH}
    return "\n".join(
        [
            f"usage: {prog} [--config RECIPE.yaml] [--SETTING VALUE ...]",
            "Trains a MegaContext model. Options win over the recipe (launch/recipes).",
            "",
            "The settings that matter, with their defaults (- is none):",
            *(f"  {label:<{LABEL_WIDTH}} {MATTER[name]}" for name, label in labels.items()),
            "",
            *textwrap.wrap(f"sections: {' '.join(SECTIONS)}", WIDTH),
            f"--help SECTION: one in full, e.g. {prog} --help mc",
            "--help-all: every setting, and the exit codes",
        ]
    )


def full_help(prefix: str = "") -> str:
    """Return every setting with its whole documentation, default and choices; with a `prefix`
    those of that section, or that setting.

    Raises ConfigError for a `prefix` that is neither.
    """
    fields = field_paths(RunConfig)
    if prefix and prefix not in fields:
        hint = suggestion(prefix, fields) or f"use one of {', '.join(SECTIONS)}"
        raise ConfigError(f"--help {prefix}: there is no such section or setting: {hint}")
    wanted = {
        path: field
        for path, field in fields.items()
        if not prefix or path == prefix or path.startswith(f"{prefix}.")
    }
    return "\n".join(line for path, field in wanted.items() for line in _entry(path, field))


def _entry(path: str, field: FieldInfo) -> Iterable[str]:
    text = " ".join((field.description or "").split())
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        yield f"\n{path}: {text}"
        return
    choices = _choices(field.annotation)
    notes = [f"one of {', '.join(choices)}"] if choices else []
    notes.append(f"default: {_default(field)}")
    yield f"  --{path}"
    yield from textwrap.wrap(
        f"{text} ({'; '.join(notes)})",
        WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _choices(annotation: Any) -> list[str]:
    """Return the values that a field may take where they can be listed."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _choices(parts[0]) if len(parts) == 1 and get_origin(annotation) is not list else []


def _default(field: FieldInfo) -> str:
    """Return a field's default as an option would give it; `-` for none."""
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
