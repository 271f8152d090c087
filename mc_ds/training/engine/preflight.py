"""Cheap checks before data is prepared and ranks connect.

Every rank runs them. They read only configs, shapes, manifests and tokenizers, no weights or text.
"""

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from mc_ds.config import BackboneConfig, ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.data import load_tokenizer
from mc_ds.data.run_data import check_datasets
from mc_ds.storage import is_complete
from mc_ds.tasks.mixture import check_tasks
from mc_ds.training.engine.initial import Origin, fit_of
from mc_ds.weights.checkpoint.find import candidates
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.open import open_weights
from mc_ds.weights.weights import Weights

SHAPE = set(BackboneConfig.model_fields) - {"preset", "init_std"}
"""Backbone settings that its weights determine."""


class Vocabulary(NamedTuple):
    """Size and hash of the run's tokenizer."""

    size: int
    sha256: str


def with_initial_backbone(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config, with backbone settings that are not set taken from the initial weights.

    `folder` is the run's. If the run resumes, they are taken from its checkpoint. Without
    `train.init_from`, or with a preset, the config is unchanged. Raises ConfigError if the weights
    cannot be opened or the other settings do not fit their backbone.
    """
    given = (
        config.backbone.model_dump(exclude_unset=True)
        if "backbone" in config.model_fields_set
        else {}
    )
    if config.train.init_from is None or given.keys() >= SHAPE or "preset" in given:
        return config
    weights = _described(config, folder)
    if weights is None:
        return config
    theirs = weights.config.backbone.model_dump(include=SHAPE)
    settings = config.model_dump() | {"backbone": theirs | given}
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise validation_error(error, RunConfig) from error


def check_beginning(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError if the tasks do not fit `seq_len`, or if a new run cannot start from
    `train.init_from`: backbone or tokenizer differ, or a dataset is missing.
    """
    check_tasks(config)
    resumes = all_checkpoints(folder / "checkpoints") or config.resume not in ("auto", "never")
    if config.train.init_from is None or resumes:
        return
    weights = _described(config, folder)
    if weights is None:
        return
    try:
        origin = Origin.of(Path(config.train.init_from), weights)
    except ConfigError as error:
        raise ConfigError(f"train.init_from: {error}") from None
    known = known_vocabulary(config)
    if known is None:  # it will be trained; it can only be the same if it has the same size
        same = config.data.vocab_size == origin.vocab_size
        known = Vocabulary(config.data.vocab_size, origin.tokenizer if same else "")
    fit_of(origin, config.with_vocabulary(known.size), tokenizer=known.sha256)


def known_vocabulary(config: RunConfig) -> Vocabulary | None:
    """Return size and hash of the run's tokenizer; None if it will be trained. Raises ConfigError
    if the tokenizer or a dataset's manifest cannot be read, or they do not belong together.
    """
    if config.data.datasets:
        first = check_datasets(config.data)
        return Vocabulary(first.vocab_size, first.tokenizer_sha256)
    if config.data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    return Vocabulary(tokenizer.vocab_size, tokenizer.sha256)


def _described(config: RunConfig, folder: Path) -> Weights | None:
    """Open, without reading them, the weights from which the run starts or resumes: the checkpoint
    of `resume`, the run's own newest one, or `train.init_from`.

    Returns None if no checkpoint there has all its files; loading reports later which are damaged.
    """
    name, path = "train.init_from", Path(str(config.train.init_from))
    if config.resume not in ("auto", "never"):
        name, path = "resume", Path(config.resume)
    elif config.resume == "auto" and all_checkpoints(folder / "checkpoints"):
        name, path = "resume", folder
    try:
        found = candidates(path)
        whole = next((checkpoint for checkpoint in found if is_complete(checkpoint)), None)
        if found and whole is None:
            return None
        return open_weights(whole or path, verify=False)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
