"""Convert weights of any format to a bundle, streamed: memory is bounded by the largest
parameter.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.config.trained import with_inference_settings
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
    settings: Mapping[str, str] | None = None,
) -> Path:
    """Write a run, a checkpoint, a Hugging Face folder or a GGUF file as a bundle at `out`; return
    its folder.

    A checkpoint's weights are its float32 master weights. `dtype` converts backbone and GistNet;
    None keeps the stored dtype, with float16 and quantised weights as float32. `verify` first
    checks every file against the checkpoint's manifest. `notes` are facts for the model card.
    `lens_from` names other weights whose GistNet, LensNet and config the bundle gets, as when the
    backbone was trained further; the training text is then recorded only if both had the same.
    `settings` are other values of inference settings (`with_inference_settings`); figures of the
    run's validation are then left out.
    Raises ConfigError, in one line, if something is missing, damaged or not supported, or if the
    two backbones differ in more than their weights; `out` is then unchanged.
    """
    if is_bundle(path) and lens_from is None:
        raise ConfigError(
            f"{path} is a bundle already: give the folder of a run or of a checkpoint"
        )
    weights = open_weights(path, verify=verify)
    focus, title, metrics = weights, weights.title, weights.validation()
    if lens_from is not None:
        focus = _focus_for(weights, lens_from, verify=verify)
        title, metrics = f"{title}; GistNet and LensNet: {focus.title}", {}
    config = focus.config
    if settings:
        config = with_inference_settings(config, settings)
        title, metrics = f"{title}; {', '.join(f'{k} = {v}' for k, v in settings.items())}", {}
    corpora = {weights.corpus_fingerprint, focus.corpus_fingerprint}
    with BundleWriter(
        out,
        config,
        weights.tokenizer(),
        step=weights.step,
        source=title,
        dtype=dtype,
        lens_dtype=lens_dtype,
        metrics=metrics,
        trained_with=weights.versions(),
        corpus=corpora.pop() if len(corpora) == 1 else None,
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
        raise ConfigError(f"lens_from = {path} has no LensNet: use weights that have one")
    if focus.tokenizer().content() != weights.tokenizer().content():
        raise ConfigError(
            f"lens_from = {path} has another tokenizer than {weights.path}: use weights that were"
            " trained with the same one"
        )
    differing = [
        line
        for shows in ("shapes", "use")
        for line in differences(focus.config, weights.config, shows=shows, part="backbone")
    ]
    there, here = (part.config.mc.position_scheme for part in (focus, weights))
    if there != here:  # the backbone cannot adapt to another one any more
        differing.append(f"mc.position_scheme = {there!r} there, {here!r} here")
    if differing:
        raise ConfigError(
            f"lens_from = {path} does not fit {weights.path}: {'; '.join(differing)}: use weights"
            " of an earlier or later state of the same backbone"
        )
    return focus
