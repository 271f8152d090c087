"""Starting a run from given weights: what the source holds, what of it fits, and loading it one
parameter at a time.

Rank 0 reads. The other ranks hear from it what there is, judge it alike, and get each parameter as
it is loaded: partitioned ones (ZeRO-3) are gathered, filled and partitioned again one by one, whole
ones (ZeRO-1 and 2) reach them when the engine spreads rank 0's model. So no rank ever holds a
second copy of more than one parameter.

The backbone must be there in full and compute the same; GistNet and LensNet are taken whole where
they fit, else they start fresh.
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
"""Reads one parameter of a source by its name."""


@dataclass(frozen=True)
class Origin:
    """What rank 0 has found at `train.init_from`, for all ranks."""

    path: str
    step: int
    sha256: str | None
    """Of its manifest, which names the hash of every file; None where there is none."""
    vocab_size: int
    tokenizer: str
    """SHA-256 of its tokenizer."""
    tokenizer_folder: str | None
    """What `data.tokenizer` must be to have the same."""
    config: RunConfig
    shapes: dict[str, tuple[int, ...]]
    """Its parameters by name, LensNet's with `lensnet.` before; tied ones once."""

    @classmethod
    def of(cls, path: Path, weights: Weights) -> "Origin":
        """Gather the facts of opened weights."""
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
    """What of a run's model comes from its origin."""

    loaded: list[str]
    """Parts that are taken."""
    fresh: dict[str, str]
    """Parts that start fresh, and why."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from: opened, judged, not loaded yet."""

    origin: Origin
    fit: Fit
    read: Read
    """Used on rank 0 only."""

    def load_model(self, model: nn.Module) -> None:
        """Load backbone and GistNet, on all ranks together, before the engine is built."""
        load_parameters(model, self.read, lambda name: part_of(name) in self.fit.loaded)

    def load_lensnet(self, lensnet: nn.Module) -> None:
        """Load LensNet on rank 0, from where it is spread when its training is set up."""
        if "lensnet" in self.fit.loaded:
            load_parameters(lensnet, self.read, lambda name: True, prefix=LENSNET)

    def facts(self) -> dict[str, Any]:
        """Return what the run's checkpoints say of its beginning."""
        origin = self.origin
        return {
            "path": origin.path,
            "step": origin.step,
            "sha256": origin.sha256,
            "parts": self.fit.loaded,
        }

    def line(self, config: RunConfig) -> str:
        """Return what was loaded, what is fresh and why, and what the loaded weights are not used
        to.
        """
        said = [
            f"starts from {self.origin.path} (step {self.origin.step}):"
            f" {', '.join(self.fit.loaded)}"
        ]
        said += [f"{part} is fresh ({why})" for part, why in self.fit.fresh.items()]
        said += differences(self.origin.config, config, shows="habit")
        return "; ".join(said)


def open_initial(config: RunConfig, *, tokenizer: str) -> InitialWeights:
    """Open what `train.init_from` names, on all ranks together; `tokenizer` is the SHA-256 of the
    one in use.

    Raises RunStopped or ConfigError, on all ranks alike, for what is no bundle and no run, damaged,
    or does not fit.
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
    read = opened[0].weight if opened else _not_here
    return InitialWeights(origin, judge(origin, config, tokenizer=tokenizer), read)


def judge(origin: Origin, config: RunConfig, *, tokenizer: str) -> Fit:
    """Return which parts of `config`'s model the origin gives.

    Raises ConfigError that names the first difference where the backbone is another one, or what
    starts fresh would never learn.
    """
    here = f"train.init_from = {origin.path}"
    if origin.tokenizer != tokenizer:
        remedy = (
            f"set data.tokenizer = {origin.tokenizer_folder}"
            if origin.tokenizer_folder is not None
            else (
                "make a bundle of it with tools/import_hf.py, and name that here and as"
                " data.tokenizer"
            )
        )
        raise ConfigError(
            f"{here}: it reads tokens of another tokenizer ({origin.vocab_size} pieces there, "
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
            fresh[part] = "there is none"
        elif (
            difference := _first_difference(part, origin.shapes, shapes)
            or _other_use(part, origin.config, config)
        ) is not None:
            fresh[part] = difference
    if config.train.frozen == "all" and "gistnet" in fresh:
        why = fresh["gistnet"]
        raise ConfigError(
            f"{here}: train.frozen = 'all' would keep a GistNet that never learned ({why}): use"
            " frozen = backbone"
        )
    return Fit([part for part in parts if part not in fresh], fresh)


def load_parameters(
    module: nn.Module, read: Read, wanted: Callable[[str], bool], *, prefix: str = ""
) -> None:
    """Fill the parameters of `module` whose names are `wanted`, on all ranks together, with what
    rank 0 reads under `prefix` + name.

    Partitioned parameters are complete on all ranks afterwards; whole ones hold the weights on rank
    0 alone. Raises RunStopped on all ranks where rank 0 cannot read.
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
                except (ConfigError, OSError, RuntimeError) as problem:  # the others wait for it
                    line = f"cannot read {prefix}{name} of the weights to start from"
                    error = RunStopped(f"{line}: {reason(problem)}", ExitCode.STORAGE)
    agree(error)


def load_from_checkpoint(model: nn.Module, checkpoint: Path, wanted: Callable[[str], bool]) -> None:
    """Fill parameters with those of a checkpoint of any ZeRO stage and number of ranks, frozen or
    not, on all ranks together.
    """
    tensors = on_main(lambda: engine_weights(checkpoint).tensors)
    load_parameters(model, lambda name: tensors[name].read(), wanted)


def _not_here(name: str) -> Tensor:
    raise AssertionError(f"{name} is read on rank 0 only")


def _first_difference(
    part: str, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the first parameter of `part` that only one side has or that has two shapes."""
    names = [name for name in dict.fromkeys([*here, *there]) if part_of(name) == part]
    for name in names:
        if there.get(name) != here.get(name):
            shown = [
                f"is {list(shapes[name])}" if name in shapes else "is not"
                for shapes in (there, here)
            ]
            return f"{name} {shown[0]} there, {shown[1].removeprefix('is ')} here"
    return None


def _other_use(part: str, there: RunConfig, here: RunConfig) -> str | None:
    """Describe the first setting that makes equal shapes compute differently."""
    return next(iter(differences(there, here, shows="use", part=part)), None)
