"""From a pretrained model to a bundle of a plain language model, one parameter at a time."""

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mc_ds.config import ConfigError, DataConfig, MCConfig, RunConfig
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.weights.bundle import BundleWriter, DtypeName
from mc_ds.weights.pretrained.gguf_file import GGUFFile
from mc_ds.weights.pretrained.hf_folder import HFFolder
from mc_ds.weights.pretrained.llama import LlamaConfig, hf_names, part_rows

UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors of old checkpoints that hold nothing learned."""


class LlamaSource(Protocol):
    """A pretrained model of the Llama family, in whatever format."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""
        ...

    def names(self) -> frozenset[str]:
        """Names of its parameters, as Hugging Face names them."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One parameter, in the layout of Hugging Face."""
        ...

    def tokenizer(self) -> HFTokenizer:
        """Its tokenizer; it may know fewer ids than the model has rows."""
        ...


def import_hf(
    folder: str | Path, out: str | Path, *, dtype: DtypeName | None = None, overwrite: bool = False
) -> Path:
    """A bundle of the Hugging Face folder `folder` at `out`; `dtype` None keeps that of the weights (float16 becomes float32)."""
    return import_source(HFFolder(Path(folder)), out, dtype=dtype, overwrite=overwrite)


def import_gguf(
    file: str | Path, out: str | Path, *, dtype: DtypeName | None = None, overwrite: bool = False
) -> Path:
    """A bundle of the GGUF file `file` at `out`, its weights dequantised, in float32 by default."""
    return import_source(GGUFFile(Path(file)), out, dtype=dtype, overwrite=overwrite)


def import_source(
    source: LlamaSource, out: str | Path, *, dtype: DtypeName | None = None, overwrite: bool = False
) -> Path:
    """Writes the bundle; nothing stays behind where that fails. Peak memory is one parameter.

    Raises ConfigError, in one line, for what is not modelled, a parameter that is missing or left over, and a tokenizer that does not fit.
    """
    backbone = source.config.backbone()
    tokenizer = source.tokenizer().padded(source.config.vocab_size)
    run = run_config(source.config, name=_run_name(source.path), tokenizer_folder=str(out))
    with BundleWriter(
        out, run, tokenizer, step=0, source=source.path.name, dtype=dtype, overwrite=overwrite
    ) as writer:
        shapes = {
            name: writer.layout.shapes[target]
            for name, target in writer.layout.tied.items()
            if hf_names(name)[0] in source.names()
        }
        shapes |= writer.layout.shapes
        _check_names(source, {part for name in shapes for part in hf_names(name)})
        for name, shape in shapes.items():
            rows = part_rows(name, shape, backbone)
            parts = [
                _part(source, part, (n, *shape[1:]))
                for part, n in zip(hf_names(name), rows, strict=True)
            ]
            writer.add(name, torch.cat(parts) if len(parts) > 1 else parts[0])
        return writer.finish()


def run_config(config: LlamaConfig, *, name: str, tokenizer_folder: str) -> RunConfig:
    """The plain language model of this shape, whose T is the length of text that it was made for."""
    length = config.max_position_embeddings
    mc = MCConfig(
        seq_len=length,
        train_wc_length=length,
        num_random_variants=0,
        block_size=min(MCConfig.model_fields["block_size"].default, length // 4),
        recent_tokens=min(MCConfig.model_fields["recent_tokens"].default, length // 4),
    )
    data = DataConfig(tokenizer=tokenizer_folder, vocab_size=config.vocab_size)
    return RunConfig(name=name, backbone=config.backbone(), mc=mc, data=data)


def _part(source: LlamaSource, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"{source.path}: {name} has shape {list(tensor.shape)}, its config says {list(shape)}: copy the folder again"
        )
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check_names(source: LlamaSource, needed: set[str]) -> None:
    present = {name for name in source.names() if not UNUSED.search(name)}
    for problem, names in (
        ("is missing", needed - present),
        ("has no place in a plain Llama", present - needed),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(
                f"{source.path}: {min(names)}{more} {problem}: only whole models of the Llama architecture can be imported"
            )


def _run_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.removesuffix(".gguf")) or "imported"
