"""How many floating-point operations a token costs, from the recipe alone; for `train.utilization`.

Counted are the matrix products that the model's equations ask for, a multiplication and an addition
each, whatever way an implementation goes: every key that a query may see, no key that a mask hides,
and no pass that the backward computes again. Sequences count as one document each, so packing short
documents makes the true number smaller. No torch.
"""

from collections.abc import Iterable

from train.model.config import ModelConfig
from train.model.multimodal.config import VisionConfig

PASSES = 3
"""A backward pass has two products for each one of the forward pass."""


def training_flops(config: ModelConfig, length: int, *, frozen: bool = False) -> float:
    """Operations that a token of text costs in training: forward and backward.

    Args:
        config: the model.
        length: tokens of a sequence.
        frozen: only the indexers learn (`dense_warmup`): nothing else has a backward pass.
    """
    learns = indexer_flops(config, length) if frozen else forward_flops(config, length)
    return forward_flops(config, length) + (PASSES - 1) * learns


def forward_flops(config: ModelConfig, length: int) -> float:
    """Operations that a token of text costs in the forward pass, the mean over a sequence."""
    blocks = range(config.num_layers + config.mtp_depth)
    per_block = sum(
        _attention(config, index, length) + 2 * _site(config) + _feed_forward(config, index)
        for index in blocks
    )
    heads = (1 + config.mtp_depth) * (2 * config.hidden_size * config.vocab_size + _leave(config))
    memories = len(config.engram.layers) * _engram(config) if config.engram else 0
    mtp = config.mtp_depth * _enter_mtp(config)
    return per_block + heads + memories + mtp + indexer_flops(config, length)


def indexer_flops(config: ModelConfig, length: int) -> float:
    """The part of `forward_flops` that is the indexers'; 0 where they are idle."""
    if config.indexer.stage == "dense":
        return 0.0
    heads, dim, hidden = config.indexer.num_heads, config.indexer.head_dim, config.hidden_size
    per_key = 2 * heads * dim + 2 * heads
    if config.attention == "v4_hybrid":
        v4 = config.compressed
        query, keys = v4.q_lora_rank, _compressor(hidden, dim, overlap=True)
        seen = mean_seen(length, stride=v4.csa_ratio)
    else:
        query, keys = config.mla.q_lora_rank or 0, 2 * hidden * dim
        seen = mean_seen(length)
    one = 2 * query * heads * dim + keys + 2 * hidden * heads + per_key * seen
    return config.num_indexers * one


def vision_flops(config: VisionConfig, hidden_size: int, grids: Iterable[tuple[int, ...]]) -> float:
    """Operations of the tower for some images, forward and backward.

    Args:
        config: the tower.
        hidden_size: of the model.
        grids: patches of each image in t, h and w; patches of a frame see each other.
    """
    encoder = config.encoder
    width = encoder.hidden_size if encoder else hidden_size
    merged = width * config.spatial_merge**2
    between = config.projector_intermediate_size
    row = 2 * merged * hidden_size if between is None else 2 * between * (merged + hidden_size)
    patch = 2.0 * config.channels * config.frames_per_patch * config.patch_size**2 * width
    patch += row / config.spatial_merge**2
    pair = 0
    if encoder:
        patch += encoder.num_layers * (8 * width**2 + 6 * width * encoder.intermediate_size)
        pair = 4 * width * encoder.num_layers
    return float(PASSES * sum(t * h * w * patch + t * (h * w) ** 2 * pair for t, h, w in grids))


def mean_seen(length: int, *, stride: int = 1, most: int | None = None) -> float:
    """Keys that a query sees, the mean over a sequence.

    Query t (from 1) sees `t // stride` keys, which stand for `stride` tokens each, at most `most`.
    """
    full = length // stride
    full = full if most is None else min(full, most)
    return (stride * full * (full - 1) / 2 + full * (length - full * stride + 1)) / length


def _attention(config: ModelConfig, index: int, length: int) -> float:
    if config.attention == "v4_hybrid":
        return _hybrid(config, index, length)
    mla, hidden, heads = config.mla, config.hidden_size, config.num_attention_heads
    qk, rank = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.q_lora_rank
    query = hidden * heads * qk if rank is None else rank * (hidden + heads * qk)
    key_value = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    key_value += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    selects = config.attention == "dsa" and config.indexer.stage == "sparse"
    seen = mean_seen(length, most=config.indexer.top_k if selects else None)
    per_key = heads * (qk + mla.v_head_dim)
    return 2 * (query + key_value + heads * mla.v_head_dim * hidden + per_key * seen)


def _hybrid(config: ModelConfig, index: int, length: int) -> float:
    v4, hidden, heads = config.compressed, config.hidden_size, config.num_attention_heads
    ratio, wide = v4.compress_ratios[index], heads * v4.head_dim
    projections = v4.q_lora_rank * (hidden + wide) + hidden * v4.head_dim
    projections += v4.output_lora_rank * (wide + v4.output_groups * hidden)
    seen, compressor = mean_seen(length, most=v4.sliding_window), 0
    if ratio:
        sparse = ratio == v4.csa_ratio
        compressor = _compressor(hidden, v4.head_dim, overlap=sparse)
        selects = sparse and config.indexer.stage == "sparse"
        seen += mean_seen(length, stride=ratio, most=config.indexer.top_k if selects else None)
    return 2 * projections + compressor + 4 * wide * seen


def _compressor(hidden: int, width: int, *, overlap: bool) -> int:
    """Values and gates of a token, in two series with overlap."""
    return 2 * 2 * hidden * width * (2 if overlap else 1)


def _feed_forward(config: ModelConfig, index: int) -> int:
    hidden, moe = config.hidden_size, config.moe
    if index < config.num_dense_layers:
        return 6 * hidden * config.intermediate_size
    experts = moe.num_experts_per_token + moe.num_shared_experts
    return 2 * hidden * moe.num_experts + experts * 6 * hidden * moe.expert_intermediate_size


def _streams(config: ModelConfig) -> int:
    return 1 if config.residual == "plain" else config.hyper_connection.num_streams


def _site(config: ModelConfig) -> int:
    """Maps of a token, what is read by them, and the streams mixed by the residual map."""
    if config.residual == "plain":
        return 0
    n, hidden = _streams(config), config.hidden_size
    maps = n * hidden * (n + 2 if config.residual == "hc" else n * (n + 2))
    return 2 * (maps + n * hidden + n * n * hidden)


def _leave(config: ModelConfig) -> int:
    """The read-out of the streams; a mean has no product."""
    n = _streams(config)
    gated = config.residual != "plain" and config.hyper_connection.read_out == "gated"
    return 2 * n * config.hidden_size * (n + 1) if gated else 0


def _engram(config: ModelConfig) -> int:
    assert config.engram is not None
    engram, hidden = config.engram, config.hidden_size
    memory = len(engram.ngram_orders) * engram.num_heads * engram.head_dim
    return 2 * memory * hidden * (_streams(config) + 1)


def _enter_mtp(config: ModelConfig) -> int:
    matrices = 2 if config.mtp_kind == "v3" else 1 + _streams(config)
    return 2 * matrices * config.hidden_size**2
