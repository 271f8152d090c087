"""From a run or a checkpoint to a bundle: streamed, so that memory is bounded by the largest parameter and not by the model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.config.recipe import read_recipe
from mc_ds.data import PreparedCorpus, Tokenizer, load_tokenizer, prepare_corpus
from mc_ds.data.prepare import open_prepared
from mc_ds.storage import MANIFEST, damage, reason
from mc_ds.training.checkpoint.save import TRAINER
from mc_ds.weights.bundle import BundleWriter, DtypeName, is_bundle
from mc_ds.weights.bundle.layout import LENSNET
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.checkpoint.shards import lens_weights, open_weights

CARD_FIGURES = re.compile(r"val/(loss|loss_baseline|horizon_loss/\w+|hit_rate/\w+)")
"""What of a run's last validation the model card shows."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself."""

    checkpoint: Path
    config: RunConfig
    trainer: Mapping[str, Any]
    """The content of `trainer.json`."""

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.checkpoint.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.trainer["step"])

    def requirement(self, name: str, default: str) -> str:
        """A fact that a run must have in common with the checkpoint."""
        return str(self.trainer.get("requirements", {}).get(name, default))

    def title(self) -> str:
        """Where the weights come from, in words."""
        ranks = self.trainer["world_size"]
        return f"run {self.config.name}, {self.checkpoint.name}, ZeRO-{self.trainer['zero_stage']} on {ranks} rank{'s' * (ranks != 1)}"


def export_bundle(
    path: str | Path,
    out: str | Path,
    *,
    dtype: DtypeName | None = None,
    lens_dtype: DtypeName = "fp32",
    verify: bool = True,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Writes the bundle of a checkpoint, or of the newest one of a run, of any ZeRO stage and number of ranks; returns its folder.

    Master weights in float32 are the source; `dtype` converts those of backbone and GistNet. `verify` verifies every file against the
    checkpoint's manifest first; `notes` are facts for the model card. Raises ConfigError, in one line, for what is missing, damaged or
    unknown; `out` is then as it was.
    """
    checkpoint = find_source(Path(path))
    if verify and (problem := damage(checkpoint)) is not None:
        raise ConfigError(
            f"checkpoint {checkpoint} is damaged: {problem}: restore it, or name another one"
        )
    source = read_source(checkpoint)
    weights = open_weights(checkpoint).tensors
    if source.config.mc.num_random_variants:
        weights |= {f"{LENSNET}{name}": tensor for name, tensor in lens_weights(checkpoint).items()}
    with BundleWriter(
        out,
        source.config,
        run_tokenizer(source),
        step=source.step,
        source=source.title(),
        dtype=dtype,
        lens_dtype=lens_dtype,
        metrics=last_validation(source.run, source.step),
        trained_with=source.trainer.get("versions"),
        notes=notes,
        overwrite=overwrite,
    ) as writer:
        for name, tensor in weights.items():
            writer.add(name, tensor.read())
        return writer.finish()


def find_source(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a run, whole or not: an older one in its place would be a silent surprise.

    Raises ConfigError where there is none.
    """
    if is_bundle(path):
        raise ConfigError(
            f"{path} is a bundle already: give the folder of a run or of a checkpoint"
        )
    if (path / MANIFEST).exists() or (path / TRAINER).exists():
        return path
    found = [*all_checkpoints(path), *all_checkpoints(path / "checkpoints")]
    if not found:
        raise ConfigError(
            f"{path} is no checkpoint and no run that has one: give the folder of a run or of a checkpoint"
        )
    return found[0]


def read_source(checkpoint: Path) -> Source:
    """Config and trainer's state of a checkpoint. Raises ConfigError where they cannot be read."""
    try:
        trainer = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
        missing = sorted({"step", "world_size", "zero_stage"} - trainer.keys())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{checkpoint / TRAINER} cannot be read ({reason(error)}): restore it, or name another checkpoint"
        ) from None
    if missing:
        raise ConfigError(
            f"{checkpoint / TRAINER} lacks {', '.join(missing)}: it is not a checkpoint of this version"
        )
    recipe = checkpoint.parent.parent / "config.yaml"
    if not recipe.exists():
        raise ConfigError(
            f"{recipe} is missing: a checkpoint is read inside the folder of its run, which says what the model is"
        )
    try:
        return Source(checkpoint, RunConfig.model_validate(read_recipe(recipe)), trainer)
    except ValidationError as error:
        raise validation_error(error, RunConfig, source=str(recipe)) from None


def run_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with. Raises ConfigError where only another one can be found."""
    if not any(source.run.glob("tokenizer.*")):
        return run_corpus(source).tokenizer
    tokenizer = load_tokenizer(source.run)
    if tokenizer.sha256 != source.requirement("tokenizer", tokenizer.sha256):
        raise ConfigError(
            f"{source.run / tokenizer.file_name} is not the tokenizer of {source.checkpoint}: restore that one"
        )
    return tokenizer


def run_corpus(source: Source) -> PreparedCorpus:
    """The corpus that a run read, from the cache of its data; where that is gone it is prepared again, with the run's own tokenizer.

    Raises ConfigError where that needs a tokenizer that is gone too.
    """
    data = source.config.data
    folder = Path(data.cache_dir) / source.requirement("data", "unknown")
    if folder.is_dir():
        return open_prepared(folder)
    if any(source.run.glob("tokenizer.*")):
        data = data.model_copy(update={"tokenizer": str(source.run)})
    corpus = prepare_corpus(data)
    if corpus.tokenizer.sha256 != source.requirement("tokenizer", corpus.tokenizer.sha256):
        raise ConfigError(
            f"the tokenizer of {source.checkpoint} is lost, and its corpus has changed: copy the tokenizer to {source.run}"
        )
    return corpus


def last_validation(run: Path, step: int) -> dict[str, float]:
    """Figures of the last validation up to `step` in the run's `metrics.jsonl`; none where it has none, or no readable record."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return {}
    figures: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(record, dict) and record.get("step", step + 1) <= step:
            found = {
                name: float(value)
                for name, value in record.items()
                if CARD_FIGURES.fullmatch(name) and isinstance(value, int | float)
            }
            figures = found or figures
    return figures
