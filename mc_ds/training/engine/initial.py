"""Loads a run's initial weights (`train.init_from`), after deciding which parts of them fit.

The backbone must be complete and compute the same function. GistNet and LensNet are loaded if they
fit completely, and otherwise keep their random initialisation.

Only rank 0 reads. It sends names and shapes to the other ranks, which make the same decision.
Partitioned parameters (ZeRO-3) are gathered, filled and partitioned again one by one. With ZeRO-1
and 2, the engine later broadcasts rank 0's model. No rank holds a second copy of more than one
parameter.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from mc_ds.config import ConfigError, RunConfig
from mc_ds.storage import reason
from mc_ds.training.checkpoint.find import choose_together
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import agree, agreed, is_main, on_main
from mc_ds.weights.checkpoint.find import candidates
from mc_ds.weights.checkpoint.shards import engine_weights
from mc_ds.weights.compatibility import differences
from mc_ds.weights.layout import LENSNET, layout_of, part_of
from mc_ds.weights.open import open_weights
from mc_ds.weights.weights import Weights

Read = Callable[[str], Tensor]
"""Reads one parameter of the initial weights, by name."""


@dataclass(frozen=True)
class Origin:
    """Facts about the weights at `train.init_from`, read by rank 0 and sent to all ranks."""

    path: str
    step: int
    sha256: str | None
    """Hash of the manifest, which covers every file; None without a manifest."""
    vocab_size: int
    tokenizer: str
    """SHA-256 of the tokenizer."""
    tokenizer_folder: str | None
    """Value of `data.tokenizer` that selects the same tokenizer; None if no folder has it."""
    config: RunConfig
    shapes: dict[str, tuple[int, ...]]
    """Parameter shapes by name. LensNet's have the prefix `lensnet.`; tied parameters occur
    once.
    """

    @classmethod
    def of(cls, path: Path, weights: Weights) -> "Origin":
        """Collect the facts about opened weights."""
        folder = weights.tokenizer_folder
        return cls(
            path=str(path),
            step=weights.step,
            sha256=weights.sha256(),
            vocab_size=weights.vocab_size,
            tokenizer=weights.tokenizer().sha256,
            tokenizer_folder=None if folder is None else str(folder),
            config=weights.config,
            shapes=weights.parameters,
        )


class Fit(NamedTuple):
    """Which parts of a run's model are loaded from the initial weights."""

    loaded: list[str]
    """Parts that are loaded."""
    fresh: dict[str, str]
    """Parts that keep their random initialisation, with the reason."""


@dataclass(frozen=True)
class InitialWeights:
    """A run's initial weights: opened and compared with the config, but not loaded yet."""

    origin: Origin
    fit: Fit
    read: Read
    """Works on rank 0 only."""

    def load_model(self, model: nn.Module) -> None:
        """Load backbone and GistNet. A collective; call it before the engine is built."""
        load_parameters(model, self.read, lambda name: part_of(name) in self.fit.loaded)

    def load_lensnet(self, lensnet: nn.Module) -> None:
        """Load LensNet on rank 0. `ReplicatedLens` later sends its weights to the other ranks."""
        if "lensnet" in self.fit.loaded:
            load_parameters(lensnet, self.read, lambda name: True, prefix=LENSNET)

    def facts(self) -> dict[str, Any]:
        """Return the facts about these weights that are stored in the run's checkpoints."""
        origin = self.origin
        return {
            "path": origin.path,
            "step": origin.step,
            "sha256": origin.sha256,
            "parts": self.fit.loaded,
        }

    def line(self, config: RunConfig) -> str:
        """Return a line that says which parts were loaded, which were not and why, and which
        settings differ from those that the weights were trained with.
        """
        parts = [
            f"starts from {self.origin.path} (step {self.origin.step}):"
            f" {', '.join(self.fit.loaded)}"
        ]
        parts += [f"{part} is initialised randomly ({why})" for part, why in self.fit.fresh.items()]
        parts += differences(self.origin.config, config, shows="habit")
        return "; ".join(parts)


def open_initial(config: RunConfig, *, tokenizer: str) -> InitialWeights:
    """Open the weights at `train.init_from`. A collective.

    `tokenizer` is the SHA-256 of the run's tokenizer. Raises RunStopped or ConfigError on all ranks
    if the path is neither a bundle nor a run, or if the weights are damaged or do not fit.
    """
    assert config.train.init_from is not None
    path = Path(config.train.init_from)
    opened: list[Weights] = []

    def open_on_main(chosen: Path, *, verify: bool) -> Origin:
        opened.append(open_weights(chosen, verify=verify))
        return Origin.of(path, opened[0])

    def choose() -> Path | None:
        found = on_main(lambda: candidates(path))
        return choose_together(path, found) if found else None

    doing = "train.init_from"
    checkpoint = agreed(choose, doing=doing)
    origin = on_main(
        lambda: open_on_main(checkpoint or path, verify=checkpoint is None), doing=doing
    )
    read = opened[0].weight if opened else _fail_to_read
    return InitialWeights(origin, fit_of(origin, config, tokenizer=tokenizer), read)


def fit_of(origin: Origin, config: RunConfig, *, tokenizer: str) -> Fit:
    """Decide which parts of `config`'s model to load from the initial weights.

    Raises ConfigError if the tokenizer or backbone differs, or if a frozen GistNet could not be
    loaded.
    """
    here = f"train.init_from = {origin.path}"
    if origin.tokenizer != tokenizer:
        remedy = (
            f"set data.tokenizer = {origin.tokenizer_folder}"
            if origin.tokenizer_folder is not None
            else (
                "convert the model to a bundle with tools/import_hf.py, and use its path for"
                " train.init_from and data.tokenizer"
            )
        )
        raise ConfigError(
            f"{here} was trained with another tokenizer (vocabulary {origin.vocab_size} there, "
            f"{config.data.vocab_size} here): {remedy}"
        )
    shapes = layout_of(config, vocab_size=config.data.vocab_size).shapes
    difference = _first_difference("backbone", origin.shapes, shapes)
    if difference is None:
        difference = _other_use("backbone", origin.config, config)
    if difference is not None:
        raise ConfigError(f"{here}: {difference}: use the same backbone")
    parts = list(dict.fromkeys(map(part_of, shapes)))
    fresh: dict[str, str] = {}
    for part in parts:
        if part not in config.train.init_parts:
            fresh[part] = "not in train.init_parts"
        elif part not in map(part_of, origin.shapes):
            fresh[part] = "missing there"
        elif (
            difference := _first_difference(part, origin.shapes, shapes)
            or _other_use(part, origin.config, config)
        ) is not None:
            fresh[part] = difference
    if config.train.frozen == "all" and "gistnet" in fresh and not config.mc.random_blocks:
        why = fresh["gistnet"]
        raise ConfigError(
            f"{here}: train.frozen = 'all' would freeze a random GistNet ({why}): use"
            " train.frozen = backbone"
        )
    return Fit([part for part in parts if part not in fresh], fresh)


def load_parameters(
    module: nn.Module, read: Read, wanted: Callable[[str], bool], *, prefix: str = ""
) -> None:
    """Load the parameters of `module` whose names are `wanted`: rank 0 reads `prefix` + name.

    A collective. Partitioned parameters are then loaded on all ranks, others only on rank 0. Raises
    RunStopped on all ranks if rank 0 cannot read.
    """
    error: Exception | None = None
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        partitioned = hasattr(parameter, "ds_id")
        with (
            (
                deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
                if partitioned
                else nullcontext()
            ),
            torch.no_grad(),
        ):
            if is_main() and error is None:
                try:
                    parameter.copy_(read(prefix + name))
                except (ConfigError, OSError, RuntimeError) as problem:
                    # Raise it only after the loop, because the other ranks take part in it.
                    line = f"cannot read {prefix}{name} of the initial weights"
                    error = RunStopped(f"{line}: {reason(problem)}", ExitCode.STORAGE)
    agree(error)


def load_from_checkpoint(model: nn.Module, checkpoint: Path, wanted: Callable[[str], bool]) -> None:
    """Load the `wanted` parameters from a checkpoint of any ZeRO stage and number of ranks. A
    collective.
    """
    tensors = on_main(lambda: engine_weights(checkpoint).tensors)
    load_parameters(model, lambda name: tensors[name].read(), wanted)


def _fail_to_read(name: str) -> Tensor:
    raise AssertionError(f"{name} is read on rank 0 only")


def _first_difference(
    part: str, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Describe the first parameter of `part` that one side lacks or whose shapes differ; None if
    there is none.
    """
    names = [name for name in dict.fromkeys([*here, *there]) if part_of(name) == part]
    for name in names:
        if there.get(name) != here.get(name):
            shown = [
                f"{list(shapes[name])}" if name in shapes else "missing" for shapes in (there, here)
            ]
            return f"{name} is {shown[0]} there, {shown[1]} here"
    return None


def _other_use(part: str, there: RunConfig, here: RunConfig) -> str | None:
    """Describe the first differing setting that changes what the same weights compute; None if
    there is none.
    """
    return next(iter(differences(there, here, shows="use", part=part)), None)
