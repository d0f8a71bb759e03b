"""Schema of `model.attention` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

AttentionKind = Literal["mla", "dsa", "v4_hybrid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    q_lora_rank: int = 96
    """Width of the query latent."""
    kv_lora_rank: int = 64
    """Width of the shared key-value latent."""
    qk_nope_head_dim: int = 32
    """Width per head of the part of queries and keys without positions."""
    qk_rope_head_dim: int = 16
    """Width of the rotary part; even. The key's rotary part is shared by all heads."""
    v_head_dim: int = 32
    """Width per head of the values."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
