"""Convert weights of any format to a bundle, streamed: memory is bounded by the largest
parameter.
"""

from collections.abc import Mapping
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.weights.bundle import BundleWriter, DtypeName, is_bundle
from mc_ds.weights.open import open_weights


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
    """Write a run, a checkpoint, a Hugging Face folder or a GGUF file as a bundle at `out`; return
    its folder.

    A checkpoint's weights are its float32 master weights. `dtype` converts backbone and GistNet;
    None keeps the stored dtype, with float16 and quantised weights as float32. `verify` first
    checks every file against the checkpoint's manifest. `notes` are facts for the model card.
    Raises ConfigError, in one line, if something is missing, damaged or not supported; `out` is
    then unchanged.
    """
    if is_bundle(path):
        raise ConfigError(
            f"{path} is a bundle already: give the folder of a run or of a checkpoint"
        )
    weights = open_weights(path, verify=verify)
    with BundleWriter(
        out,
        weights.config,
        weights.tokenizer(),
        step=weights.step,
        source=weights.title,
        dtype=dtype,
        lens_dtype=lens_dtype,
        metrics=weights.validation(),
        trained_with=weights.versions(),
        corpus=weights.corpus_fingerprint,
        notes=notes,
        overwrite=overwrite,
    ) as writer:
        for name, tensor in weights.weights():
            writer.add(name, tensor)
            del tensor  # free it before the next one is read
        return writer.finish()
