"""Schema of `model.attention` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

AttentionKind = Literal["mla", "dsa", "v4_hybrid"]
IndexerStage = Literal["dense", "dense_warmup", "sparse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """Context extension by interpolated rotary frequencies (YaRN, arXiv 2309.00071)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    factor: float = 40.0
    """Context after the extension over the context before; more than 1."""
    original_max_position_embeddings: int = 4096
    """Context before the extension, in tokens."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this within the old context stay as they are."""
    beta_slow: float = 1.0
    """Frequencies that turn less often than this are divided by `factor`; a ramp lies between."""
    mscale: float = 1.0
    """Weight of `ln(factor)` in the factor on the rotary tables."""
    mscale_all_dim: float = 1.0
    """Weight of `ln(factor)` that the tables are divided by and the softmax scale gets squared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    q_lora_rank: int | None = 96
    """Width of the query latent; null: one matrix for queries (DeepSeek-V2-Lite), `mla` only."""
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
    yarn: YarnConfig | None = None
    """Extension of the context; null trains with the plain frequencies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerConfig:
    """Lightning indexer of `dsa` (DeepSeek-V3.2-Exp, section 1) and `v4_hybrid`; unused by `mla`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_heads: int = 4
    """Index heads."""
    head_dim: int = 32
    """Width of an index head; `qk_rope_head_dim` of its channels carry the position."""
    top_k: int = 64
    """Keys (tokens; entries of v4_hybrid) that a query attends to in the sparse stage."""
    stage: IndexerStage = "sparse"
    """dense: full attention, the indexer idle and frozen; dense_warmup: full attention, everything
    frozen but the indexer, which learns from it; sparse: attention over the selected keys, the main
    model learns from the language loss and the indexer from the attention."""
    loss_weight: float = 1.0
    """Weight of the indexer's loss. Nothing else moves the indexer, and the loss nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedConfig:
    """Hybrid attention of `attention: v4_hybrid` (DeepSeek-V4, arXiv 2606.19348, section 2.3)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    compress_ratios: tuple[int, ...] = (0, 4, 16, 4, 0)
    """Tokens of an entry in each layer, then in each MTP block: 0 (window only), `csa_ratio` or
    `hca_ratio`. Ratios beyond the model's last block are not used."""
    csa_ratio: int = 4
    """m of compressed sparse attention: overlapping entries, of which the indexer selects."""
    hca_ratio: int = 16
    """m' of heavily compressed attention: all entries are attended to."""
    sliding_window: int = 32
    """Uncompressed tokens that a query attends to in every layer, its own included."""
    q_lora_rank: int = 96
    """Width of the query latent, which the indexer shares."""
    head_dim: int = 64
    """Width of a head, and of the one key-value row that serves all heads."""
    rope_head_dim: int = 16
    """Last channels of a head that carry the position, also of an index head; even."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies in layers without entries."""
    compress_rope_theta: float = 160000.0
    """The same in layers with entries."""
    yarn: YarnConfig | None = None
    """Extension of the context in layers with entries; it changes the frequencies only."""
    output_groups: int = 2
    """Groups of heads that are projected to `output_lora_rank` each before they are mixed."""
    output_lora_rank: int = 64
    """Width of a group's projection."""
