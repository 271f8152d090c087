"""Small tokenizers and Llama-family folders, as Hugging Face libraries would write them."""

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

TEXT = [inspect.getsource(module) for module in (inspect, json, textwrap)]
"""What tokenizers learn from."""


def byte_level(
    vocab_size: int = 700,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>"),
    begin: str | None = None,
) -> bytes:
    """A `tokenizer.json` in the manner of GPT-2 and SmolLM2; `begin` is a special token that it
    puts before every text, as Llama 3 does.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, special.index(begin))]
        )
    return tokenizer.to_str().encode()


def byte_fallback() -> bytes:
    """A `tokenizer.json` in the manner of Llama 2: a mark for spaces, one before every text,
    bytes for what is not in the vocabulary.
    """
    special = ["<unk>", "<s>", "</s>"]
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz=?",
        "ab",
        "abc",
        "▁a",
        "▁ab",
    ]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("ab", "c")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str().encode()


GQA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
"""A `config.json` as transformers 4 wrote it: grouped queries, tied embeddings."""
UNTIED = {**GQA, "num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 1e4}


def weights(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights under Hugging Face's names; norms are random too, or one could stand for
    another.
    """
    dim, ffn, head_dim = (
        config["hidden_size"],
        config["intermediate_size"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], dim),
        "model.norm.weight": (dim,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    for layer in range(config["num_hidden_layers"]):
        kv = config["num_key_value_heads"] * head_dim
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (dim,),
                "self_attn.q_proj": (dim, dim),
                "self_attn.k_proj": (kv, dim),
                "self_attn.v_proj": (kv, dim),
                "self_attn.o_proj": (dim, dim),
                "post_attention_layernorm": (dim,),
                "mlp.gate_proj": (ffn, dim),
                "mlp.up_proj": (ffn, dim),
                "mlp.down_proj": (dim, ffn),
            }.items()
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2)
            + (len(shape) == 1)
        ).to(dtype)
        for name, shape in shapes.items()
    }


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor] | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """A Hugging Face folder of one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(
        byte_level(config["vocab_size"]) if tokenizer is None else tokenizer
    )
    save_file(
        weights(config) if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
