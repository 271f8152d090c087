"""What is cheap to find out is found out first: before any token is made and before ranks meet.

Every rank looks for itself. Nothing here reads weights or text, only their descriptions: configs,
shapes, manifests and tokenizers.
"""

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from mc_ds.config import BackboneConfig, ConfigError, RunConfig
from mc_ds.config.errors import validation_error
from mc_ds.data import load_tokenizer
from mc_ds.data.tokenizer import FOLDER
from mc_ds.storage import is_complete
from mc_ds.tasks.mixture import check_tasks
from mc_ds.training.engine.initial import Origin, fit_of
from mc_ds.weights.checkpoint.find import candidates
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.open import open_weights
from mc_ds.weights.weights import Weights

SHAPE = set(BackboneConfig.model_fields) - {"preset", "init_std"}
"""Fields of the backbone that its weights decide."""


class Vocabulary(NamedTuple):
    """What is known of the run's tokenizer before there are tokens."""

    size: int
    sha256: str


def with_initial_backbone(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run with the backbone of the weights that it starts from, in so far as it gives no
    shape of its own; `folder` is the run's.

    A run that resumes takes it from its checkpoint. Raises ConfigError for weights that cannot be
    opened, and where the rest of the config does not fit their backbone.
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
    """Raise ConfigError where the tasks do not fit the run's lengths, or a run without checkpoints
    cannot start from `train.init_from`: a backbone of other shapes, or another tokenizer.
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
    if known is None:  # a tokenizer yet to be trained: the same at most where it is as large
        same = config.data.vocab_size == origin.vocab_size
        known = Vocabulary(config.data.vocab_size, origin.tokenizer if same else "")
    fit_of(origin, config.with_vocabulary(known.size), tokenizer=known.sha256)


def known_vocabulary(config: RunConfig) -> Vocabulary | None:
    """Return what is known of the tokenizer; None where it is to be trained."""
    folder = config.data.tokenizer
    if config.data.datasets:
        folder = str(Path(config.data.datasets[0].path) / FOLDER)
    if folder is None:
        return None
    tokenizer = load_tokenizer(Path(folder))
    return Vocabulary(tokenizer.vocab_size, tokenizer.sha256)


def _described(config: RunConfig, folder: Path) -> Weights | None:
    """Open the weights that the run goes on from, without reading them: the newest of its own, of
    the checkpoint that `resume` names, or `train.init_from`. None where no checkpoint there has all
    its files: what reads them says which are damaged.
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
