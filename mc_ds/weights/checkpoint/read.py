"""`Checkpoint`: the weights of a run, of any ZeRO stage and number of ranks, read without an
engine.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.data import OtherText, RunData, Tokenizer, load_tokenizer, open_data
from mc_ds.data.prepare import open_prepared
from mc_ds.storage import MANIFEST, fingerprint, open_regular
from mc_ds.weights.checkpoint.find import candidates, newest_whole, problem_of
from mc_ds.weights.checkpoint.folder import CheckpointRemovedError
from mc_ds.weights.checkpoint.lazy import StoredTensor
from mc_ds.weights.checkpoint.shards import engine_weights, lens_weights
from mc_ds.weights.checkpoint.trainer import TRAINER, read_trainer
from mc_ds.weights.layout import LENSNET
from mc_ds.weights.report import warn
from mc_ds.weights.weights import Weights, with_default_cache

CARD_FIGURES = re.compile(r"val/(loss|loss_baseline|horizon_loss/\w+|hit_rate/\w+)")
"""Metrics of a run's last validation that go on the model card."""

ATTEMPTS = 5
"""Number of attempts at opening, if the run removes checkpoints meanwhile."""


def open_checkpoint(
    path: Path, *, verify: bool = True, report: Callable[[str], None] = warn
) -> "Checkpoint":
    """Open a checkpoint, or the newest undamaged one of a run. With `verify` all its files are read
    and hashed, otherwise the newest is opened unchecked. If a run that is still training removes
    the checkpoint meanwhile, a newer one is opened instead.

    Raises ConfigError, in one line, if there is none, and for files that are missing, damaged or
    unknown.
    """
    removals = 0
    while True:
        found = candidates(path)
        if not found:
            raise ConfigError(
                f"{path} is not a checkpoint, a run with one, a bundle, a Hugging Face"
                " folder or a GGUF file"
            )
        inspect = problem_of if verify else lambda checkpoint: None
        try:
            return read_checkpoint(newest_whole(path, found, inspect=inspect, report=report))
        except CheckpointRemovedError as error:
            removals += 1
            if error.checkpoint == path or removals == ATTEMPTS:
                raise


def read_checkpoint(checkpoint: Path) -> "Checkpoint":
    """Open a checkpoint without verifying its files. Raises ConfigError if something is missing or
    unknown, CheckpointRemovedError if its run removes it meanwhile.
    """
    try:
        trainer = read_trainer(checkpoint)
        config = _config_of(checkpoint, trainer)
        engine = engine_weights(checkpoint)
        lens = lens_weights(checkpoint) if config.mc.num_random_variants else {}
    except ConfigError:
        if checkpoint.exists():
            raise
        raise CheckpointRemovedError(checkpoint) from None
    tensors = engine.tensors | {f"{LENSNET}{name}": tensor for name, tensor in lens.items()}
    return Checkpoint(checkpoint, config, trainer, tensors, engine.tied)


class Checkpoint(Weights):
    """An opened checkpoint inside the folder of its run. Its weights are the float32 master
    weights, each read on demand.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: RunConfig,
        trainer: dict[str, Any],
        tensors: dict[str, StoredTensor],
        tied: dict[str, str],
    ) -> None:
        ranks, step = trainer["world_size"], int(trainer["step"])
        super().__init__(
            checkpoint,
            config,
            title=(
                f"run {config.name}, {checkpoint.name}, ZeRO-{trainer['zero_stage']} on {ranks}"
                f" rank{'s' * (ranks != 1)}"
            ),
            step=step,
            parameters={name: tensor.shape for name, tensor in tensors.items()},
            tied=tied,
            corpus_fingerprint=trainer["corpus"],
        )
        self.run = checkpoint.parent.parent
        """The run's folder."""
        self.trainer = trainer
        """The content of `trainer.json`."""
        self.requirements: dict[str, Any] = trainer["requirements"]
        """The facts that a resuming run must share with it."""
        self._tensors = tensors

    @property
    def tokenizer_folder(self) -> Path:
        """The run's folder if it has a tokenizer, else that of its corpus in the cache."""
        return self.run if any(self.run.glob("tokenizer.*")) else self._cached_corpus

    @property
    def _cached_corpus(self) -> Path:
        return Path(self.config.data.cache_dir) / str(self.requirements["data"])

    def weight(self, name: str) -> Tensor:
        """Read one parameter into a new tensor."""
        return self._tensors[name].read()

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer that the run was trained with. Raises ConfigError if only a different
        one is found.
        """
        if not any(self.run.glob("tokenizer.*")):
            return self.corpus().tokenizer
        tokenizer = load_tokenizer(self.run)
        if tokenizer.sha256 != self.requirements["tokenizer"]:
            raise ConfigError(
                f"{self.run / tokenizer.file_name} is not the tokenizer of {self.path}: restore the"
                " run's own"
            )
        return tokenizer

    def corpus(
        self, report: Callable[[str], None] = warn, *, other: OtherText | None = None
    ) -> RunData:
        """Open the run's corpus from its data cache. If the cache is gone, prepare the corpus again
        with the run's tokenizer; raises ConfigError if that is gone too. Open an `other` text
        instead if it is given.
        """
        if other is not None:
            return super().corpus(report, other=other)
        if self._cached_corpus.is_dir():
            return RunData.of(open_prepared(self._cached_corpus, str(self.trainer["corpus"])))
        if any(self.run.glob("tokenizer.*")):
            return super().corpus(report)
        corpus = open_data(with_default_cache(self.config.data))
        if corpus.tokenizer.sha256 != self.requirements["tokenizer"]:
            raise ConfigError(
                f"the tokenizer of {self.path} is missing and cannot be rebuilt, since its corpus"
                f" has changed: copy the tokenizer to {self.run}"
            )
        return corpus

    def validation(self) -> dict[str, float]:
        """Return the metrics of the last validation up to the checkpoint, from the run's
        `metrics.jsonl`; empty without one.
        """
        return last_validation(self.run / "metrics.jsonl", self.step)

    def sha256(self) -> str:
        """Return the hash of the checkpoint's manifest."""
        return fingerprint(self.path / MANIFEST).sha256

    def versions(self) -> dict[str, str] | None:
        """Return the versions of the software that wrote the checkpoint."""
        return self.trainer.get("versions")


def last_validation(record: Path, step: int) -> dict[str, float]:
    """Return the metrics of the last validation up to `step` in a run's `metrics.jsonl`; empty if
    there is none.
    """
    if not record.exists():
        return {}
    figures: dict[str, float] = {}
    with open_regular(record, follow=True) as file:
        for line in file:
            figures = _figures(line, step) or figures
    return figures


def _figures(line: bytes, step: int) -> dict[str, float]:
    """Return the card's metrics in one line of `metrics.jsonl`, if its step is at most `step`.
    Returns none for a line that is not valid JSON, as the last one of a killed run may be.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return {}
    return {
        name: value
        for name, value in entry.items()
        if entry["step"] <= step and CARD_FIGURES.fullmatch(name) and isinstance(value, float)
    }


def _config_of(checkpoint: Path, trainer: dict[str, Any]) -> RunConfig:
    """Return the config that the checkpoint was trained with. Raises ConfigError if it is not valid
    in this version.
    """
    try:
        return RunConfig.model_validate(trainer["config"])
    except ValidationError as error:
        raise validation_error(error, RunConfig, source=str(checkpoint / TRAINER)) from None
