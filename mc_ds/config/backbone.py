"""`BackboneConfig`: the shape of a Llama-family decoder, from a preset or field by field."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from mc_ds.config.errors import Settings
from mc_ds.config.types import Depth, Width

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        dim=192, num_layers=4, num_heads=3, num_kv_heads=3, ffn_dim=512, tie_embeddings=True
    ),
    "124m": dict(
        dim=768, num_layers=12, num_heads=12, num_kv_heads=4, ffn_dim=2304, tie_embeddings=True
    ),
    "360m": dict(
        dim=960, num_layers=32, num_heads=15, num_kv_heads=5, ffn_dim=2560, tie_embeddings=True
    ),
    "1b": dict(
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=8192,
        rope_base=5e5,
        tie_embeddings=True,
    ),
    "8b": dict(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=14336,
        rope_base=5e5,
        tie_embeddings=False,
    ),
    "70b": dict(
        dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        ffn_dim=28672,
        rope_base=5e5,
        tie_embeddings=False,
    ),
}


class BackboneConfig(Settings):
    """Shape of the decoder: RMSNorm, SwiGLU, grouped-query attention, rotary positions (Llama
    family).
    """

    preset: Literal["tiny", "124m", "360m", "1b", "8b", "70b"] | None = None
    """Named shape; fields below that are set explicitly override it."""
    dim: Width = 192
    """Width D of the residual stream and of tree nodes."""
    num_layers: Depth = 4
    """Decoder blocks."""
    num_heads: Width = 3
    """Query heads."""
    num_kv_heads: Width = 3
    """Key and value heads; fewer than `num_heads` for grouped-query attention."""
    ffn_dim: Width = 512
    """Width of the SwiGLU feed-forward layer."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """The output head shares the embedding's weights."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; that of residual output projections is divided by
    sqrt(2 num_layers).
    """

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]], **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"num_heads = {self.num_heads} must divide dim = {self.dim} into heads of even"
                " width"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads
