"""The Llama architecture in the form of Hugging Face: its `config.json`, and which of its
parameters make up each of ours.

Both pair rotary channels (c, c + C/2), so weights need no permutation. Ours fuse the query, key and
value projections, and the gate and up projections.

Legend: D width, F feed-forward width, H query heads, J key/value heads, C channels per head.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mc_ds.config import BackboneConfig, ConfigError
from mc_ds.config.errors import validation_error

EMBEDDING, FINAL_NORM, HEAD = (
    "backbone.embedding.weight",
    "backbone.norm.weight",
    "backbone.head.weight",
)
OUTSIDE_BLOCKS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
BLOCK = "backbone.blocks."
INSIDE_BLOCKS = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""For each module of our block, the modules of a Hugging Face layer whose rows it stacks."""


class LlamaConfig(BaseModel):
    """The keys of a `config.json` that affect what the model computes. Missing keys have the
    defaults of the architecture.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["llama"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = Field(default=2048, ge=8)
    initializer_range: PositiveFloat = 0.02
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: Literal[False] = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    quantization_config: None = None

    @model_validator(mode="after")
    def _check(self) -> "LlamaConfig":
        if (
            self.head_dim is not None
            and self.head_dim * self.num_attention_heads != self.hidden_size
        ):
            raise ValueError(
                f"head_dim = {self.head_dim}: only hidden_size / num_attention_heads ="
                f" {self.hidden_size} / {self.num_attention_heads} is supported"
            )
        rope = self._rope
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"rope_type = {kind!r}: scaled rotary positions are not supported, only 'default'"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor = {rope['partial_rotary_factor']}: only 1.0, rotation of"
                " all channels, is supported"
            )
        self.backbone()
        return self

    @property
    def _rope(self) -> dict[str, Any]:
        """Settings of rotary positions, merged from the keys of transformers 4 and 5."""
        return {
            "rope_theta": self.rope_theta,
            **(self.rope_scaling or {}),
            **(self.rope_parameters or {}),
        }

    def backbone(self) -> BackboneConfig:
        """Return the config of a backbone of this shape."""
        return BackboneConfig(
            dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            ffn_dim=self.intermediate_size,
            rope_base=self._rope["rope_theta"],
            norm_eps=self.rms_norm_eps,
            tie_embeddings=self.tie_word_embeddings,
            init_std=self.initializer_range,
        )


def parse_config(content: dict[str, Any], source: Path) -> LlamaConfig:
    """Parse the `content` of `source`. Raises ConfigError, in one line, for unsupported
    settings.
    """
    try:
        return LlamaConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {validation_error(error, LlamaConfig)}") from None


def hf_config(backbone: BackboneConfig, *, vocab_size: int, context_len: int) -> dict[str, Any]:
    """Return the `config.json` of a backbone, for transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": backbone.dim,
        "intermediate_size": backbone.ffn_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_len,
        "initializer_range": backbone.init_std,
        "rms_norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": backbone.tie_embeddings,
    }


def hf_names(name: str) -> tuple[str, ...]:
    """Return the names of the Hugging Face parameters whose stacked rows are our parameter
    `name`.
    """
    if name in OUTSIDE_BLOCKS:
        return (OUTSIDE_BLOCKS[name],)
    layer, module, leaf = name.removeprefix(BLOCK).split(".")
    return tuple(f"model.layers.{layer}.{part}.{leaf}" for part in INSIDE_BLOCKS[module])


def part_rows(name: str, shape: tuple[int, ...], backbone: BackboneConfig) -> list[int]:
    """Return how many rows each of the `hf_names` contributes to our parameter `name` of shape
    `shape`.
    """
    match name.split(".")[-2]:
        case "qkv":
            return [
                heads * backbone.head_dim
                for heads in (backbone.num_heads, backbone.num_kv_heads, backbone.num_kv_heads)
            ]
        case "gate_up":
            return [backbone.ffn_dim] * 2
    return [shape[0]]
