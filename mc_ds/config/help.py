"""The help texts: `--help` shows one screen of important settings, `--help SECTION` one section in
full, `--help-all` everything.
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
    "deepspeed_config": "DeepSpeed JSON, e.g. the ZeRO stage",
    "seed": "for initialisation, sampling and variants",
    "backbone.preset": "tiny, 124m, 360m, 1b, 8b, 70b; or a shape",
    "data.source": "stdlib (Python's own source) or files",
    "data.root": "folder of text files, for data.source files",
    "data.tasks": "mixture of tasks, e.g. '{\"recall\": 1}'",
    "data.tokenizer": "folder of a tokenizer; else one is trained",
    "data.vocab_size": "vocabulary of the tokenizer to train",
    "mc.seq_len": "tokens T of a training sequence",
    "mc.train_wc_length": "entries W of its working context",
    "mc.block_size": "children per gist, K",
    "mc.max_lod": "levels of gists",
    "mc.num_random_variants": "variants per sequence; 0: a plain LM",
    "mc.recent_tokens": "last tokens, never compressed",
    "mc.lens_start_step": "when LensNet starts, or curriculum_end",
    "train.total_steps": "optimizer steps",
    "train.global_batch_size": "sequences per step, over all ranks",
    "train.micro_batch_size": "sequences per rank and micro-step",
    "train.learning_rate": "peak; for LensNet see mc.lens_lr",
    "train.warmup_steps": "steps of linear warm-up",
    "train.init_from": "a bundle, run or checkpoint to start from",
    "train.frozen": "none, backbone, or all but LensNet",
    "validation.eval_interval": "steps between validations; 0: none",
    "validation.eval_sequences": "held-out sequences, the same each time",
    "checkpoint.interval": "steps between checkpoints; 0: only the last",
    "telemetry.wandb": "mirror metrics to Weights & Biases",
    "dry_run": "print parameters and memory, then exit",
}
"""Settings listed by `--help`, with their short descriptions."""

SECTIONS = [
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]
WIDTH = 79
LABEL_WIDTH = 31
"""Width for a setting's name and default in the short help; a default that does not fit is left
out.
"""


def short_help(prog: str) -> str:
    """Return one screen of help: usage, the most important settings with their defaults, and how to
    list the others.
    """
    fields = field_paths(RunConfig)
    labels = {name: f"--{name} {_default(fields[name])}" for name in MATTER}
    labels |= {name: f"--{name}" for name, label in labels.items() if len(label) > LABEL_WIDTH}
    return "\n".join(
        [
            f"usage: {prog} [--config RECIPE.yaml] [--SETTING VALUE ...]",
            "Train a MegaContext model. Options override the recipe (see launch/recipes).",
            "",
            "The most important settings, with their defaults (- is none):",
            *(f"  {label:<{LABEL_WIDTH}} {MATTER[name]}" for name, label in labels.items()),
            "",
            *textwrap.wrap(f"sections: {' '.join(SECTIONS)}", WIDTH),
            f"--help SECTION: one section in full, e.g. {prog} --help mc",
            "--help-all: every setting, and the exit codes",
        ]
    )


def full_help(prefix: str = "") -> str:
    """Return all settings with documentation, choices and default, or only those of `prefix`, a
    section or a setting.

    Raises ConfigError if `prefix` is neither.
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
    """Return the values of a Literal (also of an optional one); empty for other types."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _choices(parts[0]) if len(parts) == 1 and get_origin(annotation) is not list else []


def _default(field: FieldInfo) -> str:
    """Return a field's default as one would type it on the command line; `-` for None."""
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
