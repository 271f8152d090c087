"""Starting a run from given weights: what the source holds, what of it fits, and loading it one parameter at a time.

Rank 0 reads. The other ranks hear from it what there is, judge it alike, and get each parameter as it is loaded: partitioned ones (ZeRO-3)
are gathered, filled and partitioned again one by one, whole ones (ZeRO-1 and 2) reach them when the engine spreads rank 0's model. So no
rank ever holds a second copy of more than one parameter.

The backbone must be there in full and compute the same; GistNet and LensNet are taken whole where they fit, else they start fresh.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from mc_ds.config import ConfigError, RunConfig
from mc_ds.storage import MANIFEST, damage, fingerprint, reason
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import agree, broadcast, gather, rank_and_world
from mc_ds.weights.bundle import Bundle, is_bundle, open_bundle
from mc_ds.weights.bundle.layout import LENSNET, layout_of, part_of
from mc_ds.weights.checkpoint.lazy import StoredTensor
from mc_ds.weights.checkpoint.shards import lens_weights, open_weights
from mc_ds.weights.export import find_source, read_source

T = TypeVar("T")
Read = Callable[[str], Tensor]
"""Reads one parameter of a source by its name, into memory of its own."""
BACKBONE_SETTINGS = ("num_heads", "num_kv_heads", "rope_base", "norm_eps")
"""What shapes do not say, and a backbone's weights mean nothing without."""
LENSNET_SETTINGS = ("lens_heads", "lens_ask_reach")
"""The same of LensNet's."""
NOTED_SETTINGS = ("block_size", "position_scheme", "position_damping", "lens_block_scores")
"""What weights can get used to: a difference is said, not refused."""


@dataclass(frozen=True)
class Origin:
    """What rank 0 has found at `train.init_from`."""

    path: str
    step: int
    sha256: str
    """Of its manifest, which names the hash of every file."""
    vocab_size: int
    tokenizer: str
    """SHA-256 of its tokenizer."""
    tokenizer_folder: str
    """What `data.tokenizer` must be to have the same."""
    config: RunConfig
    shapes: dict[str, tuple[int, ...]]
    """Its parameters by name, LensNet's with `lensnet.` before; tied ones once."""
    read: Read
    """Used on rank 0 only."""


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

    def load_model(self, model: nn.Module) -> None:
        """Loads backbone and GistNet, on all ranks together, before the engine is built."""
        load_parameters(model, self.origin.read, lambda name: part_of(name) in self.fit.loaded)

    def load_lensnet(self, lensnet: nn.Module) -> None:
        """Loads LensNet on rank 0, from where it is spread when its training is set up."""
        if "lensnet" in self.fit.loaded:
            load_parameters(lensnet, self.origin.read, lambda name: True, prefix=LENSNET)

    def facts(self) -> dict[str, Any]:
        """What the run's checkpoints say of its beginning."""
        origin = self.origin
        return {
            "path": origin.path,
            "step": origin.step,
            "sha256": origin.sha256,
            "parts": self.fit.loaded,
        }

    def line(self, config: RunConfig) -> str:
        """What was loaded, what is fresh and why, and what the loaded weights are not used to."""
        said = [
            f"starts from {self.origin.path} (step {self.origin.step}): {', '.join(self.fit.loaded)}"
        ]
        said += [f"{part} is fresh ({why})" for part, why in self.fit.fresh.items()]
        said += _differences(NOTED_SETTINGS, self.origin.config.mc, config.mc, "mc.")
        return "; ".join(said)


def open_initial(config: RunConfig, *, tokenizer: str) -> InitialWeights:
    """Opens what `train.init_from` names, on all ranks together; `tokenizer` is the SHA-256 of the one in use.

    Raises ConfigError, on all ranks alike, for what is no bundle and no run, damaged, or does not fit.
    """
    assert config.train.init_from is not None
    path = Path(config.train.init_from)
    try:
        origin = (
            _from_main(lambda: _bundle_origin(path))
            if broadcast(is_bundle(path))
            else _checkpoint_origin(path)
        )
    except ConfigError as error:
        raise ConfigError(f"train.init_from: {error}") from error
    return InitialWeights(origin, judge(origin, config, tokenizer=tokenizer))


def judge(origin: Origin, config: RunConfig, *, tokenizer: str) -> Fit:
    """Which parts of `config`'s model the origin gives.

    Raises ConfigError that names the first difference where the backbone is another one, or what starts fresh would never learn.
    """
    here = f"train.init_from = {origin.path}"
    if origin.tokenizer != tokenizer:
        raise ConfigError(
            f"{here}: it reads tokens of another tokenizer ({origin.vocab_size} pieces there, {config.data.vocab_size} here): "
            f"set data.tokenizer = {origin.tokenizer_folder}"
        )
    shapes = layout_of(config, vocab_size=config.data.vocab_size).shapes
    difference = _first_difference("backbone", origin.shapes, shapes)
    if difference is None:
        difference = next(
            iter(
                _differences(
                    BACKBONE_SETTINGS, origin.config.backbone, config.backbone, "backbone."
                )
            ),
            None,
        )
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
            f"{here}: train.frozen = 'all' would keep a GistNet that never learned ({why}): use frozen = backbone"
        )
    return Fit([part for part in parts if part not in fresh], fresh)


def load_parameters(
    module: nn.Module, read: Read, wanted: Callable[[str], bool], *, prefix: str = ""
) -> None:
    """Fills the parameters of `module` whose names are `wanted`, on all ranks together, with what rank 0 reads under `prefix` + name.

    Partitioned parameters are complete on all ranks afterwards; whole ones hold the weights on rank 0 alone. Raises RunStopped on all
    ranks where rank 0 cannot read.
    """
    error: RunStopped | None = None
    is_main = rank_and_world()[0] == 0
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        partitioned = hasattr(parameter, "ds_id")
        with (
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            if partitioned
            else nullcontext(),
            torch.no_grad(),
        ):
            if is_main and error is None:
                try:
                    parameter.copy_(read(prefix + name))
                except (
                    ConfigError,
                    OSError,
                    RuntimeError,
                ) as problem:  # the others are waiting for this parameter
                    error = RunStopped(
                        f"cannot read {prefix}{name} of the weights to start from: {reason(problem)}",
                        ExitCode.STORAGE,
                    )
    agree(error)


def load_from_checkpoint(model: nn.Module, checkpoint: Path, wanted: Callable[[str], bool]) -> None:
    """Fills parameters with those of a checkpoint of any ZeRO stage and number of ranks, frozen or not, on all ranks together."""
    tensors = _from_main(lambda: open_weights(checkpoint).tensors)
    load_parameters(model, partial(_read_stored, tensors), wanted)


def _bundle_origin(path: Path) -> Origin:
    """A bundle, every file of which is verified."""
    bundle = open_bundle(path)
    return Origin(
        path=str(path),
        step=bundle.step,
        sha256=fingerprint(path / MANIFEST).sha256,
        vocab_size=bundle.vocab_size,
        tokenizer=bundle.tokenizer().sha256,
        tokenizer_folder=str(path),
        config=bundle.config,
        shapes=bundle.parameters,
        read=partial(_read_from_bundle, bundle),
    )


def _checkpoint_origin(path: Path) -> Origin:
    """A checkpoint, or the newest one of a run; the ranks share the work of verifying its files."""
    checkpoint = _from_main(lambda: find_source(path))
    problem = next(
        (found for found in gather(damage(checkpoint, *rank_and_world())) if found is not None),
        None,
    )
    if problem is not None:
        raise ConfigError(
            f"checkpoint {checkpoint} is damaged: {problem}: restore it, or name another one"
        )
    return _from_main(lambda: _opened_checkpoint(path, checkpoint))


def _opened_checkpoint(path: Path, checkpoint: Path) -> Origin:
    source = read_source(checkpoint)
    required = source.trainer["requirements"]
    tensors = open_weights(checkpoint).tensors
    if source.config.mc.num_random_variants:
        tensors |= {f"{LENSNET}{name}": tensor for name, tensor in lens_weights(checkpoint).items()}
    cached = (
        Path(source.config.data.cache_dir) / required["data"]
    )  # runs have not always kept their tokenizer
    return Origin(
        path=str(path),
        step=source.step,
        sha256=fingerprint(checkpoint / MANIFEST).sha256,
        vocab_size=source.config.data.vocab_size,
        tokenizer=required["tokenizer"],
        tokenizer_folder=str(source.run if any(source.run.glob("tokenizer.*")) else cached),
        config=source.config,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=partial(_read_stored, tensors),
    )


def _read_from_bundle(bundle: Bundle, name: str) -> Tensor:
    return next(tensor for stored, tensor in bundle.weights(name) if stored == name)


def _read_stored(tensors: Mapping[str, StoredTensor], name: str) -> Tensor:
    return tensors[name].read()


def _from_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on all ranks; where it cannot read, a ConfigError is raised on all of them."""
    results: list[T] = []
    said: str | None = None
    if rank_and_world()[0] == 0:
        try:
            results.append(action())
        except ConfigError as error:
            said = str(error)
        except (OSError, KeyError) as error:  # the others are waiting
            said = f"the weights to start from cannot be read ({reason(error)})"
    results, said = broadcast((results, said))
    if said is not None:
        raise ConfigError(said)
    return results[0]


def _first_difference(
    part: str, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first parameter of `part` that only one side has or that has two shapes."""
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
    """How equal shapes of GistNet or LensNet are read in two ways, if they are."""
    if part == "gistnet" and gist_heads(there) != gist_heads(here):
        return f"mc.gist_heads = {gist_heads(there)} there, {gist_heads(here)} here"
    found = _differences(LENSNET_SETTINGS, there.mc, here.mc, "mc.") if part == "lensnet" else []
    return found[0] if found else None


def gist_heads(config: RunConfig) -> int:
    """Attention heads of GistNet's blocks, the default resolved."""
    return config.mc.gist_heads or max(1, (config.mc.gist_dim or config.backbone.dim) // 64)


def _differences(names: tuple[str, ...], there: Any, here: Any, prefix: str) -> list[str]:
    """Settings that differ, with both values."""
    pairs = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return [
        f"{prefix}{name} = {theirs!r} there, {ours!r} here"
        for name, theirs, ours in pairs
        if theirs != ours
    ]
