"""Schema of `model.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

ResidualKind = Literal["plain", "hc", "mhc"]
AttentionKind = Literal["mla", "dsa", "v4_hybrid"]
RouterKind = Literal["softmax", "sigmoid", "sqrtsoftplus", "hash"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperConnectionConfig:
    """Residual streams of `residual: hc` and `residual: mhc`; unused by `plain`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_streams: int = 4
    """Parallel residual streams n."""
    sinkhorn_iterations: int = 20
    """Column+row passes that make the residual map of mHC doubly stochastic (t_max)."""
    gate_init: float = 0.01
    """Initial alpha, the weight of the input-dependent part of each map."""
    phi_init_std: float = 0.02
    """mHC: standard deviation of the projections that produce the maps (unpublished; our choice)."""
    residual_bias_init: float = 6.0
    """mHC: initial diagonal c of the residual map's logits; Sinkhorn of c*I is close to I."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """Mixture of experts with auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_experts: int = 8
    """Routed experts in a layer."""
    num_experts_per_token: int = 2
    """Routed experts that see a token (top-k)."""
    num_shared_experts: int = 1
    """Experts that see every token; computed as one of `num_shared_experts` times the width."""
    expert_intermediate_size: int = 64
    """Width of one expert."""
    routed_scaling_factor: float = 1.0
    """Factor on the normalised routing weights."""
    bias_update_speed: float = 1e-3
    """gamma of the load-balancing bias: added or subtracted once per optimizer step."""
    balance_loss_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (eq. 17-20); 0 switches it off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """Engram conditional memory (arXiv 2601.07372); see train/model/engram.py."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: tuple[int, ...] = (1,)
    """Zero-based layers that read the memory, before their attention."""
    ngram_orders: tuple[int, ...] = (2, 3)
    """Suffix lengths that are hashed: consecutive integers from 2."""
    num_heads: int = 4
    """Hash heads per order; each has its own prime modulus."""
    rows_per_head: int = 2000
    """Lower bound of a head's rows; the rows are the next unused prime."""
    head_dim: int = 16
    """Width of one row. The memory's width is orders x heads x head_dim."""
    conv_kernel_size: int = 4
    """Taps of the causal depthwise convolution on the output, dilated by the highest order."""
    seed: int = 0
    """Seed of the hash multipliers."""
    pad_token_id: int = 2
    """Token that stands for the positions before the start of a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model. Every switch of the V4 stack is a key here."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's size."""
    hidden_size: int = 128
    """Width of one residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_dense_layers: int = 1
    """Leading blocks with a dense FFN in place of the mixture of experts."""
    intermediate_size: int = 352
    """Width of a dense FFN."""
    num_attention_heads: int = 4
    """Query heads."""
    attention: AttentionKind = "mla"
    """Attention of every block."""
    mla: MlaConfig = field(default_factory=MlaConfig)
    residual: ResidualKind = "mhc"
    """plain: pre-norm residual; hc: unconstrained hyper-connections; mhc: manifold-constrained."""
    hyper_connection: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    router: RouterKind = "sigmoid"
    """Scoring of the experts."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    engram: EngramConfig | None = None
    """Conditional memory; null trains without."""
    mtp_depth: int = 0
    """Tokens beyond the next that are predicted by extra blocks (V3 section 2.2); 0 or 1."""
    mtp_loss_weight: float = 0.3
    """lambda of the multi-token-prediction loss."""
    swiglu_limit: float | None = 10.0
    """Clamp of the SwiGLU: gate <= limit, up in [-limit, limit] (V4); null switches it off."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the weight matrices at the start."""


def violations(config: ModelConfig) -> list[str]:
    """Rules that a well-typed model configuration breaks, one line each: `path=value: rule; fix`."""
    return [
        *_refused(config),
        *_wrong_sizes(config),
        *(_wrong_engram(config, config.engram) if config.engram else []),
    ]


def _refused(config: ModelConfig) -> list[str]:
    """Choices that the schema names and the model does not have."""
    found = []
    if config.attention != "mla":
        found.append(f"model.attention={config.attention}: not implemented; use mla")
    if config.router == "hash":
        found.append("model.router=hash: not implemented; use softmax, sigmoid or sqrtsoftplus")
    if config.mtp_depth not in (0, 1):
        found.append(f"model.mtp_depth={config.mtp_depth}: only depth 0 or 1; use 1")
    return found


def _wrong_sizes(config: ModelConfig) -> list[str]:
    """Sizes that cannot be computed with."""
    found = []
    if config.mla.qk_rope_head_dim % 2:
        found.append(
            f"model.mla.qk_rope_head_dim={config.mla.qk_rope_head_dim}: channels are rotated in "
            f"pairs; use {config.mla.qk_rope_head_dim + 1}"
        )
    if not 1 <= config.moe.num_experts_per_token <= config.moe.num_experts:
        found.append(
            f"model.moe.num_experts_per_token={config.moe.num_experts_per_token}: must be between 1 "
            f"and model.moe.num_experts={config.moe.num_experts}; use {min(2, config.moe.num_experts)}"
        )
    if config.residual != "plain" and config.hyper_connection.num_streams < 2:
        found.append(
            f"model.hyper_connection.num_streams={config.hyper_connection.num_streams}: at least 2 "
            f"with model.residual={config.residual}; use 4, or model.residual=plain"
        )
    if config.hyper_connection.sinkhorn_iterations < 1:
        found.append(
            "model.hyper_connection.sinkhorn_iterations="
            f"{config.hyper_connection.sinkhorn_iterations}: at least 1; use 20"
        )
    return found


def _wrong_engram(config: ModelConfig, engram: EngramConfig) -> list[str]:
    """Memories that do not fit the model."""
    found = []
    outside = [layer for layer in engram.layers if not 0 <= layer < config.num_layers]
    if outside or len(set(engram.layers)) < len(engram.layers):
        found.append(
            f"model.engram.layers={list(engram.layers)}: different layers from 0 to "
            f"model.num_layers-1={config.num_layers - 1}; use [{min(1, config.num_layers - 1)}]"
        )
    consecutive = tuple(range(2, 2 + len(engram.ngram_orders)))
    if not consecutive or engram.ngram_orders != consecutive:
        found.append(
            f"model.engram.ngram_orders={list(engram.ngram_orders)}: consecutive integers from 2; "
            f"use {list(consecutive or (2, 3))}"
        )
    if not 0 <= engram.pad_token_id < config.vocab_size:
        found.append(
            f"model.engram.pad_token_id={engram.pad_token_id}: a token id below "
            f"model.vocab_size={config.vocab_size}; use 2"
        )
    return found
