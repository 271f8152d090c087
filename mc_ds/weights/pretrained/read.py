"""`Pretrained`: a model of the Llama family, opened as the weights of a plain language model."""

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mc_ds.config import BackboneConfig, ConfigError, DataConfig, MCConfig, RunConfig
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.weights.claims import blocks_in
from mc_ds.weights.layout import layout_of
from mc_ds.weights.pretrained.llama import LlamaConfig, hf_names, part_rows
from mc_ds.weights.weights import Weights

UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Names of tensors of old checkpoints that hold nothing learned and are ignored."""


class LlamaSource(Protocol):
    """A pretrained model of the Llama family, in any format."""

    @property
    def path(self) -> Path:
        """Its folder or file."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""
        ...

    def names(self) -> frozenset[str]:
        """Return the Hugging Face names of its parameters."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter from its file's header, without reading it."""
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
        _check_claims(source)
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
        for name in (*layout.shapes, *repeated):
            _check_shapes(source, name, layout.shapes[repeated.get(name, name)], config.backbone)
        super().__init__(
            source.path,
            config,
            title=source.path.name,
            step=0,
            parameters=layout.shapes,
            tied=layout.tied,
        )
        for name, target in repeated.items():
            if not torch.equal(self._read(name), self.weight(target)):
                raise ConfigError(
                    f"{source.path}: {name} differs from {target}, although its config ties them:"
                    " set tie_word_embeddings = false"
                )

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder; None for a single file, and if the tokenizer has fewer ids than the embedding
        has rows.
        """
        whole = self._source.tokenizer().vocab_size == self._source.config.vocab_size
        return self.path if self.path.is_dir() and whole else None

    def tokenizer(self) -> HFTokenizer:
        """Read the tokenizer, padded to the number of rows of the embedding."""
        return self._source.tokenizer().padded(self._source.config.vocab_size)

    def weight(self, name: str) -> Tensor:
        """Read one parameter; float16 is converted to float32."""
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        parts = [_part(self._source, part) for part in hf_names(name)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def run_config(config: LlamaConfig, *, name: str, tokenizer: str) -> RunConfig:
    """Return the config of a plain language model of this shape, with the model's maximum length as
    T.
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


def _part(source: LlamaSource, name: str) -> Tensor:
    tensor = source.tensor(name)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check_shapes(
    source: LlamaSource, name: str, shape: tuple[int, ...], backbone: BackboneConfig
) -> None:
    """Raise ConfigError if the Hugging Face parameters of our parameter `name` do not make up its
    `shape`.
    """
    for part, rows in zip(hf_names(name), part_rows(name, shape, backbone), strict=True):
        if source.shape(part) != (rows, *shape[1:]):
            raise _wrong_shape(source, part, source.shape(part), (rows, *shape[1:]))


def _check_claims(source: LlamaSource) -> None:
    """Raise ConfigError if the config claims other sizes than the files have, before modules of
    these sizes are built.
    """
    config = source.config
    layers = blocks_in(source.names(), "model.layers.")
    if layers != config.num_hidden_layers:
        raise ConfigError(
            f"{source.path}: num_hidden_layers = {config.num_hidden_layers}, but its files have"
            f" {layers}: only complete models of the Llama architecture can be imported"
        )
    embedding, wanted = "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    if embedding in source.names() and source.shape(embedding) != wanted:
        raise _wrong_shape(source, embedding, source.shape(embedding), wanted)


def _wrong_shape(
    source: LlamaSource, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> ConfigError:
    return ConfigError(
        f"{source.path}: {name} has shape {list(found)}, but {list(wanted)} by its config: copy the"
        " folder again"
    )


def _check_names(source: LlamaSource, needed: set[str]) -> None:
    present = {name for name in source.names() if not UNUSED.search(name)}
    for problem, names in (
        ("is missing", needed - present),
        ("is not part of a plain Llama", present - needed),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(
                f"{source.path}: {min(names)}{more} {problem}: only complete models of the Llama"
                " architecture can be imported"
            )


def _run_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.removesuffix(".gguf")) or "imported"
