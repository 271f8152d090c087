"""`GGUFFile`: a model in the format of llama.cpp, one file with shape, tokenizer and (mostly
quantised) weights.

llama.cpp rotates neighbouring channels (2c, 2c + 1), so the rows of its query and key weights are
permuted. They are restored to the order of Hugging Face, in which channels (c, c + C/2) rotate
together. Reading needs the `gguf` package.

Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.storage import reason
from mc_ds.weights.pretrained.gguf_header import check_header
from mc_ds.weights.pretrained.llama import LlamaConfig, parse_config

OUTSIDE_BLOCKS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INSIDE_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are matched as a whole. Control tokens are special tokens."""


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
}
"""Supported pre-tokenizers, by the value of `tokenizer.ggml.pre`."""


class GGUFFile:
    """A GGUF file with a model of the Llama family; weights are memory-mapped. Raises ConfigError,
    in one line, for any other file.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ConfigError(
                f"{path}: reading GGUF files needs the gguf package: pip install gguf"
            ) from None
        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
        except Exception as error:  # reading a damaged file can raise anything
            raise ConfigError(
                f"{path} is not a readable GGUF file ({reason(error)}): copy it again"
            ) from None
        self.path = path
        self._dequantize = gguf.quants.dequantize
        self._fields = reader.fields
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        self.config: LlamaConfig = parse_config(self._config(), path)

    def names(self) -> frozenset[str]:
        """Return the Hugging Face names of all parameters."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter in the layout of Hugging Face, from the file's
        header.
        """
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """Read one parameter in float32, in the layout of Hugging Face. Raises ConfigError for an
        unknown quantisation.
        """
        stored = self._tensors[name]
        try:
            weights: NDArray[np.float32] = self._dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ConfigError(
                f"{self.path}: {name} has the unknown type {stored.tensor_type.name}: use another"
                " quantisation"
            ) from None
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        return torch.from_numpy(np.array(weights if heads is None else unpermute(weights, heads)))

    def tokenizer(self) -> HFTokenizer:
        """Return the byte-level BPE tokenizer of the metadata. Raises ConfigError for other
        kinds.
        """
        kind, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise ConfigError(
                f"{self.path}: tokenizer {kind!r} with pre-tokenizer {pre!r}: only 'gpt2' with"
                f" {' or '.join(map(repr, PRE_TOKENIZERS))} is supported, import the model's"
                " Hugging Face folder instead"
            )
        pieces: list[str] = self._list("tokenizer.ggml.tokens", str)
        types: list[int] = self._list("tokenizer.ggml.token_type", int)
        merges = [tuple(merge.split(" ")) for merge in self._list("tokenizer.ggml.merges", str)]
        if len(types) != len(pieces) or any(len(merge) != 2 for merge in merges):
            raise ConfigError(
                f"{self.path}: its tokenizer has {len(pieces)} pieces, {len(types)} types and"
                f" {len(merges)} merges, which do not belong together: copy it again"
            )
        vocabulary = {piece: token for token, piece in enumerate(pieces)}
        try:
            tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{self.path}: its tokenizer is invalid ({reason(error)}): copy it again"
            ) from None
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
        tokenizer.decoder = decoders.ByteLevel()
        whole = [
            tokenizers.AddedToken(piece, special=type_ == CONTROL, normalized=False)
            for piece, type_ in zip(pieces, types, strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
        tokenizer.add_tokens(whole)
        return HFTokenizer(tokenizer.to_str(pretty=True).encode(), f"{self.path}: its tokenizer")

    def _config(self) -> dict[str, Any]:
        """Return the model's shape under the names of a Hugging Face `config.json`."""
        architecture = self._field("general.architecture")
        embedding = "model.embed_tokens.weight"
        scaling = (
            "linear"
            if "rope_freqs.weight" in self._tensors
            else self._field("llama.rope.scaling.type", "none")
        )
        content = {
            "model_type": architecture,
            "vocab_size": self.shape(embedding)[0] if embedding in self._tensors else None,
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": _decimal(self._field("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _decimal(self._field("llama.rope.freq_base", 10_000.0)),
            "rope_scaling": None if scaling == "none" else {"rope_type": scaling},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        return {key: value for key, value in content.items() if value is not None}

    def _field(self, name: str, default: Any = None) -> Any:
        """Return one entry of the metadata. Raises ConfigError if it cannot be read."""
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise ConfigError(
                f"{self.path}: {name} cannot be read ({reason(error)}): copy it again"
            ) from None

    def _list(self, name: str, kind: type) -> list[Any]:
        """Return an entry of the metadata that is a list of `kind`. Raises ConfigError for another
        type.
        """
        values = self._field(name)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ConfigError(
                f"{self.path}: {name} is not a list of {kind.__name__}: use a file with a complete"
                " tokenizer"
            )
        return values


def unpermute(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of [heads * C, D] from neighbouring pairs of channels to pairs (c, c +
    C/2).
    """
    rows, dim = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, dim).swapaxes(1, 2).reshape(rows, dim)


def _decimal(value: Any) -> Any:
    """Return the shortest decimal that rounds to the same float32: 1e-5, not 9.99999975e-6. Other
    types are returned unchanged.
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor; unknown names are returned unchanged."""
    stem, _, leaf = name.rpartition(".")
    if stem in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[stem]}.{leaf}"
    _, layer, module = (
        stem.split(".") if stem.count(".") == 2 and stem.startswith("blk.") else ("", "", "")
    )
    return (
        f"model.layers.{layer}.{INSIDE_BLOCKS[module]}.{leaf}" if module in INSIDE_BLOCKS else name
    )
