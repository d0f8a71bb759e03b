"""Rules that a well-typed `model.*` can break; called by `launch.validate` and by the model itself.

One small function a rule; each yields lines `path=value: rule; what to type instead`. No torch.
"""

import math
from collections.abc import Callable, Iterator

from parallel.layout import either
from train.model.attention.config import YarnConfig
from train.model.config import ModelConfig

Problems = Iterator[str]


def violations(config: ModelConfig) -> list[str]:
    """Everything that is wrong with a model; empty if it can be built.

    The sizes must be positive already.
    """
    return [problem for rule in _RULES for problem in rule(config)]


def tensor_parallel_violations(config: ModelConfig, size: int) -> list[str]:
    """What of a model cannot be shared by `size` tensor-parallel ranks; empty if all can."""
    return list(_tensor_parallel(config, size))


def _tensor_parallel(config: ModelConfig, size: int) -> Problems:
    counts = {"model.num_attention_heads": config.num_attention_heads}
    if config.attention == "v4_hybrid":
        counts["model.compressed.output_groups"] = config.compressed.output_groups
    common = math.gcd(*counts.values())
    if common % size:
        legal = [n for n in range(1, common + 1) if common % n == 0]
        yield (
            f"parallel.tensor_parallel_size={size}: must divide "
            f"{' and '.join(f'{path}={count}' for path, count in counts.items())}; use "
            f"{either(legal)}"
        )
    widths = {"model.vocab_size": config.vocab_size}
    if config.num_dense_layers:
        widths["model.intermediate_size"] = config.intermediate_size
    for path, width in widths.items():
        if width % size:
            below = width - width % size
            yield (
                f"{path}={width}: must be a multiple of parallel.tensor_parallel_size={size}; use "
                f"{either([n for n in (below, below + size) if n])}"
            )


def _attention(config: ModelConfig) -> Problems:
    width = config.mla.qk_rope_head_dim
    if width % 2:
        yield (
            f"model.mla.qk_rope_head_dim={width}: rotary positions turn pairs of numbers, so it "
            f"must be even; use {width - 1} or {width + 1}"
        )
    yield from _yarn("model.mla.yarn", config.mla.yarn)


def _yarn(path: str, yarn: YarnConfig | None) -> Problems:
    if yarn is not None and yarn.factor <= 1:
        yield (
            f"{path}.factor={yarn.factor}: must be more than 1; for example 4, or "
            f"{path}=null for the plain frequencies"
        )
    if yarn is not None and yarn.beta_slow >= yarn.beta_fast:
        yield (
            f"{path}.beta_slow={yarn.beta_slow}: must be less than "
            f"{path}.beta_fast={yarn.beta_fast}; for example 1 and 32"
        )


def _compressed(config: ModelConfig) -> Problems:
    v4, heads = config.compressed, config.num_attention_heads
    if config.attention != "v4_hybrid":
        return
    if v4.csa_ratio == v4.hca_ratio:
        yield (
            f"model.compressed.hca_ratio={v4.hca_ratio}: must differ from csa_ratio, for the ratio "
            "says which of the two a layer is; for example 128 beside 4"
        )
    blocks, given = config.num_layers + config.mtp_depth, len(v4.compress_ratios)
    known = sorted({0, v4.csa_ratio, v4.hca_ratio})
    if given < blocks or not set(v4.compress_ratios) <= set(known):
        yield (
            f"model.compressed.compress_ratios={_brackets(list(v4.compress_ratios))}: must be one of "
            f"{', '.join(map(str, known))} for each of model.num_layers={config.num_layers} layers "
            f"and model.mtp_depth={config.mtp_depth} MTP blocks; for example "
            f"{_brackets(([0, v4.csa_ratio, v4.hca_ratio] * blocks)[:blocks])}"
        )
    widths = [("model.compressed.head_dim", v4.head_dim)]
    if v4.csa_ratio in v4.compress_ratios[:blocks]:
        widths.append(("model.indexer.head_dim", config.indexer.head_dim))
    for path, width in widths:
        if v4.rope_head_dim % 2 or v4.rope_head_dim > width:
            yield (
                f"model.compressed.rope_head_dim={v4.rope_head_dim}: must be even and at most "
                f"{path}={width}; for example {max(2, width // 4 * 2)}"
            )
    if heads % v4.output_groups:
        divisors = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        yield (
            f"model.compressed.output_groups={v4.output_groups}: must divide "
            f"model.num_attention_heads={heads}; use {', '.join(divisors)}"
        )
    yield from _yarn("model.compressed.yarn", v4.yarn)
    if v4.yarn is not None and v4.yarn.mscale != v4.yarn.mscale_all_dim:
        yield (
            f"model.compressed.yarn.mscale={v4.yarn.mscale}: V4 scales neither tables nor scores; use "
            f"model.compressed.yarn.mscale={v4.yarn.mscale_all_dim}, as mscale_all_dim"
        )


def _indexer(config: ModelConfig) -> Problems:
    width, rope = config.indexer.head_dim, config.mla.qk_rope_head_dim
    if config.attention == "dsa" and config.mla.q_lora_rank is None:
        yield (
            "model.mla.q_lora_rank=null: the indexer of model.attention=dsa reads the query latent; "
            "for example model.mla.q_lora_rank=1536, or model.attention=mla"
        )
    if config.attention == "dsa" and width < rope:
        yield (
            f"model.indexer.head_dim={width}: must hold model.mla.qk_rope_head_dim={rope} rotated "
            f"channels; use {rope} or more"
        )


def _residual(config: ModelConfig) -> Problems:
    streams = config.hyper_connection.num_streams
    if config.residual != "plain" and streams < 2:
        yield (
            f"model.hyper_connection.num_streams={streams}: at least 2 with "
            f"model.residual={config.residual}; use 4, or model.residual=plain"
        )


def _experts(config: ModelConfig) -> Problems:
    moe = config.moe
    if moe.num_experts_per_token > moe.num_experts:
        yield (
            f"model.moe.num_experts_per_token={moe.num_experts_per_token}: more than "
            f"model.moe.num_experts={moe.num_experts}; use {moe.num_experts} or fewer"
        )


def _expert_groups(config: ModelConfig) -> Problems:
    moe = config.moe
    experts, groups, chosen = moe.num_experts, moe.num_expert_groups, moe.num_groups_per_token
    if experts % groups or (groups > 1 and experts < 2 * groups):
        legal = [n for n in range(1, experts // 2 + 1) if experts % n == 0]
        yield (
            f"model.moe.num_expert_groups={groups}: must divide model.moe.num_experts={experts} "
            f"into groups of at least 2; use one of {_brackets(legal)}"
        )
    elif chosen > groups:
        yield (
            f"model.moe.num_groups_per_token={chosen}: more than "
            f"model.moe.num_expert_groups={groups}; use {groups} or fewer"
        )
    elif groups > 1 and moe.num_experts_per_token > (reachable := chosen * experts // groups):
        yield (
            f"model.moe.num_groups_per_token={chosen}: these groups hold {reachable} experts, fewer "
            f"than model.moe.num_experts_per_token={moe.num_experts_per_token}; use "
            f"model.moe.num_groups_per_token={-(-moe.num_experts_per_token * groups // experts)}"
        )


def _hash_routing(config: ModelConfig) -> Problems:
    moe, scored = config.moe, config.num_layers - config.num_dense_layers
    if config.router == "hash" and moe.num_expert_groups > 1:
        yield (
            f"model.moe.num_expert_groups={moe.num_expert_groups}: a table of token ids knows no "
            "groups; use model.moe.num_expert_groups=1 with model.router=hash"
        )
    if config.router == "hash" and moe.num_hash_layers:
        yield (
            f"model.moe.num_hash_layers={moe.num_hash_layers}: model.router=hash already makes "
            "every layer one; use model.moe.num_hash_layers=0, or model.router=sqrtsoftplus"
        )
    if moe.num_hash_layers > max(scored, 0):
        yield (
            f"model.moe.num_hash_layers={moe.num_hash_layers}: more than the {scored} layers "
            f"after model.num_dense_layers={config.num_dense_layers}; use {scored} or fewer"
        )


def _layers(config: ModelConfig) -> Problems:
    if config.num_dense_layers > config.num_layers:
        yield (
            f"model.num_dense_layers={config.num_dense_layers}: more than "
            f"model.num_layers={config.num_layers}; use {config.num_layers} or fewer"
        )
    if config.mtp_depth > 1:
        yield (
            f"model.mtp_depth={config.mtp_depth}: predicting more than one further token is not "
            "implemented yet; use 0 or 1"
        )


def _engram(config: ModelConfig) -> Problems:
    engram, depth = config.engram, config.num_layers
    if engram is None:
        return
    layers, orders = list(engram.layers), list(engram.ngram_orders)
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside or not layers or len(set(layers)) < len(layers):
        yield (
            f"model.engram.layers={_brackets(layers)}: must be different layers from 0 to "
            f"{depth - 1}, at least one; for example [{min(1, depth - 1)}], "
            "or switch the memory off with model.engram=null"
        )
    if not orders or orders != list(range(2, len(orders) + 2)):
        yield (
            f"model.engram.ngram_orders={_brackets(orders)}: must be consecutive from 2; "
            "use [2], [2,3] or [2,3,4]"
        )
    if not 0 <= engram.pad_token_id < config.vocab_size:
        yield (
            f"model.engram.pad_token_id={engram.pad_token_id}: not a token of "
            f"model.vocab_size={config.vocab_size}; use 0 to {config.vocab_size - 1}"
        )


def _vision(config: ModelConfig) -> Problems:
    vision = config.vision
    if vision is None:
        return
    width, key = config.mla.qk_rope_head_dim, "model.mla.qk_rope_head_dim"
    if config.attention == "v4_hybrid":
        width, key = config.compressed.rope_head_dim, "model.compressed.rope_head_dim"
    sections, pairs = list(vision.rope_sections), width // 2
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs:
        third = pairs // 3
        example = _brackets([pairs - 2 * third, third, third])
        yield (
            f"model.vision.rope_sections={_brackets(sections)}: must be three numbers of rotary "
            f"pairs (t, h, w) that add up to half of {key}={width}; for example {example}"
        )
    if vision.placeholder_token_id >= config.vocab_size:
        yield (
            f"model.vision.placeholder_token_id={vision.placeholder_token_id}: not a token of "
            f"model.vocab_size={config.vocab_size}; use 0 to {config.vocab_size - 1}"
        )
    encoder = vision.encoder
    if encoder is not None and encoder.hidden_size % (4 * encoder.num_attention_heads):
        step = 4 * encoder.num_attention_heads
        yield (
            f"model.vision.encoder.hidden_size={encoder.hidden_size}: each of "
            f"{encoder.num_attention_heads} heads turns pairs of channels by row and by column, so "
            f"it must be a multiple of {step}; use {-(-encoder.hidden_size // step) * step}"
        )


_RULES: list[Callable[[ModelConfig], Problems]] = [
    _attention,
    _compressed,
    _indexer,
    _residual,
    _experts,
    _expert_groups,
    _hash_routing,
    _layers,
    _engram,
    _vision,
]


def _brackets(values: list[int]) -> str:
    """A list as it is typed in an override."""
    return str(values).replace(" ", "")
