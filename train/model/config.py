"""Schema of `model.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from train.model.attention.config import AttentionKind, CompressedConfig, IndexerConfig, MlaConfig
from train.model.moe.config import MoeConfig, RouterKind
from train.model.multimodal.config import VisionConfig

ResidualKind = Literal["plain", "hc", "mhc", "mhc_single_pass"]
ReadOutKind = Literal["mean", "gated"]
MtpKind = Literal["v3", "v4"]
Recompute = Literal["none", "streams", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperConnectionConfig:
    """Residual streams of `residual: hc`, `mhc` and `mhc_single_pass`; unused by `plain`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_streams: int = 4
    """Parallel residual streams n."""
    sinkhorn_iterations: int = 20
    """Column+row passes that make the residual map of mHC doubly stochastic (t_max)."""
    read_out: ReadOutKind = "mean"
    """How the streams become one hidden state after the last block. mean: their mean; gated: by a
    learned gate for each stream (V4)."""
    compile: bool = False
    """Compile the passes over the streams with torch.compile, one loop each; false: PyTorch's own
    operations, which make more passes. On the CPU it needs a C++ compiler on every node."""
    gate_init: float = 0.01
    """Initial alpha, the weight of the input-dependent part of each map and read-out gate."""
    phi_init_std: float = 0.02
    """mHC and gated read-out: standard deviation of the projections that produce the maps
    (unpublished; our choice)."""
    residual_bias_init: float = 6.0
    """mHC: initial diagonal c of the residual map's logits; Sinkhorn of c*I is close to I."""


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
    """Taps of the causal depthwise convolution on the output, dilated by the highest order; 0: no
    convolution (V4.1)."""
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
    compressed: CompressedConfig = field(default_factory=CompressedConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    residual: ResidualKind = "mhc"
    """plain: pre-norm residual; hc: unconstrained hyper-connections; mhc: manifold-constrained (V4);
    mhc_single_pass: mhc that reads by the coefficients of the site before (V4.1)."""
    hyper_connection: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    router: RouterKind = "sigmoid"
    """Scoring of the experts; hash: chosen by token id, weighted by sqrtsoftplus."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    engram: EngramConfig | None = None
    """Conditional memory; null trains without."""
    vision: VisionConfig | None = None
    """Images and video as input; null takes text only."""
    mtp_depth: int = 0
    """Tokens beyond the next that are predicted by extra blocks (V3 section 2.2); 0 or 1."""
    mtp_kind: MtpKind = "v3"
    """v3: the read-out of the streams, beside the next token's embedding, enters the extra block (V3
    eq. 21); v4: every stream enters, plus the embedding, and the block has a read-out of its own."""
    mtp_loss_weight: float = 0.3
    """lambda of the multi-token-prediction loss."""
    mtp_loss_weight_final: float | None = None
    """lambda from where the learning rate begins to decay (V4: 0.1); null: as before."""
    swiglu_limit: float | None = 10.0
    """Clamp of the SwiGLU of routed experts and dense FFNs: gate <= limit, up in [-limit, limit]
    (V4); null switches it off. The shared expert has none, as in V4's published code."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the weight matrices at the start."""

    @property
    def num_moe_layers(self) -> int:
        """Blocks with a mixture of experts, those of MTP included."""
        return self.num_layers - self.num_dense_layers + self.mtp_depth

    @property
    def num_indexers(self) -> int:
        """Blocks that select keys by an indexer, those of MTP included."""
        blocks = self.num_layers + self.mtp_depth
        if self.attention == "v4_hybrid":
            return self.compressed.compress_ratios[:blocks].count(self.compressed.csa_ratio)
        return blocks if self.attention == "dsa" else 0
