"""`Pretrained`: a model of the Llama family, opened as the weights of a plain language model."""

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mc_ds.config import ConfigError, DataConfig, MCConfig, RunConfig
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.weights.layout import layout_of
from mc_ds.weights.pretrained.llama import LlamaConfig, hf_names, part_rows
from mc_ds.weights.weights import Weights

UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors of old checkpoints that hold nothing learned."""


class LlamaSource(Protocol):
    """A pretrained model of the Llama family, in whatever format."""

    @property
    def path(self) -> Path:
        """Its folder or file."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""
        ...

    def names(self) -> frozenset[str]:
        """Return the names of its parameters, as Hugging Face names them."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Read one parameter, in the layout of Hugging Face."""
        ...

    def tokenizer(self) -> HFTokenizer:
        """Read its tokenizer, which may have fewer ids than the embedding has rows."""
        ...


class Pretrained(Weights):
    """An opened model of the Llama family: a plain language model without GistNet and LensNet."""

    def __init__(self, source: LlamaSource) -> None:
        """Raise ConfigError, in one line, for an unsupported config, a missing or unknown
        parameter, and an output layer that differs from the embedding although the config ties
        them.
        """
        self._source = source
        config = run_config(source.config, name=_run_name(source.path), tokenizer=str(source.path))
        layout = layout_of(config, vocab_size=source.config.vocab_size)
        repeated = {
            name: target
            for name, target in layout.tied.items()
            if hf_names(name)[0] in source.names()
        }
        _check_names(
            source, {part for name in (*layout.shapes, *repeated) for part in hf_names(name)}
        )
        super().__init__(
            source.path,
            config,
            title=source.path.name,
            step=0,
            parameters=layout.shapes,
            tied=layout.tied,
        )
        for name, target in repeated.items():
            if not torch.equal(self._read(name, layout.shapes[target]), self.weight(target)):
                raise ConfigError(
                    f"{source.path}: {name} differs from {target}, which its config ties: set"
                    " tie_word_embeddings = false"
                )

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder; None for a file, and where the tokenizer has fewer ids than the embedding
        rows.
        """
        whole = self._source.tokenizer().vocab_size == self._source.config.vocab_size
        return self.path if self.path.is_dir() and whole else None

    def tokenizer(self) -> HFTokenizer:
        """Read the tokenizer, padded to as many ids as the embedding has rows."""
        return self._source.tokenizer().padded(self._source.config.vocab_size)

    def weight(self, name: str) -> Tensor:
        """Read one parameter, float16 as float32."""
        return self._read(name, self.parameters[name])

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        rows = part_rows(name, shape, self.config.backbone)
        parts = [
            _part(self._source, part, (n, *shape[1:]))
            for part, n in zip(hf_names(name), rows, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def run_config(config: LlamaConfig, *, name: str, tokenizer: str) -> RunConfig:
    """Return the config of a plain language model of this shape; T is the model's maximum
    length.
    """
    length = config.max_position_embeddings
    mc = MCConfig(
        seq_len=length,
        train_wc_length=length,
        num_random_variants=0,
        block_size=min(MCConfig.model_fields["block_size"].default, length // 4),
        recent_tokens=min(MCConfig.model_fields["recent_tokens"].default, length // 4),
    )
    data = DataConfig(tokenizer=tokenizer, vocab_size=config.vocab_size)
    return RunConfig(name=name, backbone=config.backbone(), mc=mc, data=data)


def _part(source: LlamaSource, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"{source.path}: {name} has shape {list(tensor.shape)}, its config says {list(shape)}:"
            " copy the folder again"
        )
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check_names(source: LlamaSource, needed: set[str]) -> None:
    present = {name for name in source.names() if not UNUSED.search(name)}
    for problem, names in (
        ("is missing", needed - present),
        ("is unknown in a plain Llama", present - needed),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(
                f"{source.path}: {min(names)}{more} {problem}: only whole models of the Llama"
                " architecture can be imported"
            )


def _run_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.removesuffix(".gguf")) or "imported"
