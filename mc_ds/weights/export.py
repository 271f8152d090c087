"""Convert weights of any format to a bundle, streamed: memory is bounded by the largest
parameter.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.weights.bundle import BundleWriter, DtypeName, is_bundle
from mc_ds.weights.compatibility import differences
from mc_ds.weights.layout import LENSNET, part_of
from mc_ds.weights.open import open_weights
from mc_ds.weights.weights import Weights


def export_bundle(
    path: str | Path,
    out: str | Path,
    *,
    dtype: DtypeName | None = None,
    lens_dtype: DtypeName = "fp32",
    verify: bool = True,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
    lens_from: str | Path | None = None,
) -> Path:
    """Write a run, a checkpoint, a Hugging Face folder or a GGUF file as a bundle at `out`; return
    its folder.

    A checkpoint's weights are its float32 master weights. `dtype` converts backbone and GistNet;
    None keeps the stored dtype, with float16 and quantised weights as float32. `verify` first
    checks every file against the checkpoint's manifest. `notes` are facts for the model card.
    `lens_from` names other weights whose GistNet, LensNet and config the bundle gets, as when the
    backbone was trained further. Raises ConfigError, in one line, if something is missing, damaged
    or not supported, or if the two backbones differ in more than their weights; `out` is then
    unchanged.
    """
    if is_bundle(path) and lens_from is None:
        raise ConfigError(
            f"{path} is a bundle already: give the folder of a run or of a checkpoint"
        )
    weights = open_weights(path, verify=verify)
    focus = weights if lens_from is None else _focus_for(weights, lens_from, verify=verify)
    with BundleWriter(
        out,
        focus.config,
        weights.tokenizer(),
        step=weights.step,
        source=weights.title
        if focus is weights
        else f"{weights.title}; GistNet and LensNet: {focus.title}",
        dtype=dtype,
        lens_dtype=lens_dtype,
        metrics=weights.validation() if focus is weights else {},
        trained_with=weights.versions(),
        corpus=weights.corpus_fingerprint,
        notes=notes,
        overwrite=overwrite,
    ) as writer:
        for name, tensor in _parameters(weights, focus):
            writer.add(name, tensor)
            del tensor  # free it before the next one is read
        return writer.finish()


def _parameters(weights: Weights, focus: Weights) -> Iterator[tuple[str, Tensor]]:
    """Read the backbone of `weights` and the other parts of `focus`, one parameter at a time."""
    for name in focus.parameters:
        yield name, (weights if part_of(name) == "backbone" else focus).weight(name)


def _focus_for(weights: Weights, path: str | Path, *, verify: bool) -> Weights:
    """Open the weights whose GistNet and LensNet are to read the backbone of `weights`. Raises
    ConfigError if they do not belong to such a backbone.
    """
    focus = open_weights(path, verify=verify)
    if not any(name.startswith(LENSNET) for name in focus.parameters):
        raise ConfigError(f"{path} has no LensNet: give weights that have one")
    if focus.tokenizer().content() != weights.tokenizer().content():
        raise ConfigError(
            f"{path} has another tokenizer than {weights.path}: give weights with the same one"
        )
    if differing := [
        line
        for shows in ("shapes", "use")
        for line in differences(focus.config, weights.config, shows=shows, part="backbone")
    ]:
        raise ConfigError(
            f"{path} belongs to another backbone than {weights.path}: {'; '.join(differing)}: give"
            " weights that were trained with an earlier or later state of the same backbone"
        )
    return focus
