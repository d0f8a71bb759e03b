"""Logits and all gradients against transformers' DeepSeek-V3 and V3.2 with the same random weights."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.train.model.tiny import TINY, build, relative_error
from train.model.attention.config import IndexerConfig, YarnConfig
from train.model.config import ModelConfig
from train.model.moe.config import MoeConfig
from train.model.transformer import Transformer

CONFIG = replace(TINY, residual="plain", swiglu_limit=None)
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=24, beta_fast=2.0, beta_slow=0.5)
# With few index heads none fires for some keys: they tie at 0, and which are selected is arbitrary.
INDEXER = IndexerConfig(num_heads=16, head_dim=12, top_k=20)
BLOCK_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.q.weight",
    "self_attn.q_a_proj.weight": "attention.q_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attention.q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.kv_b.weight",
    "self_attn.o_proj.weight": "attention.o.weight",
    "self_attn.indexer.wq_b.weight": "attention.indexer.q_b.weight",
    "self_attn.indexer.wk.weight": "attention.indexer.k.weight",
    "self_attn.indexer.k_norm.weight": "attention.indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "attention.indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "attention.indexer.head_weights.weight",
    "mlp.gate_proj.weight": "ffn.gate.weight",
    "mlp.up_proj.weight": "ffn.up.weight",
    "mlp.down_proj.weight": "ffn.down.weight",
    "mlp.gate.weight": "ffn.router.weight",
    "mlp.gate.e_score_correction_bias": "ffn.router.expert_bias",
    "mlp.experts.gate_up_proj": "ffn.experts.gate_up",
    "mlp.experts.down_proj": "ffn.experts.down",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared.gate.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared.up.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared.down.weight",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def our_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    return f"layers.{index}.{BLOCK_NAMES[rest]}"


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def transformers_model(ours: Transformer, *, attn_implementation: str = "eager") -> nn.Module:
    """Their model with our weights."""
    fields = config_fields(ours.config) | {"attn_implementation": attn_implementation}
    model: nn.Module
    if ours.config.attention == "dsa":
        from transformers import DeepseekV32Config, DeepseekV32ForCausalLM  # noqa: PLC0415

        indexer = ours.config.indexer
        model = DeepseekV32ForCausalLM(
            DeepseekV32Config(
                **fields,
                index_topk=indexer.top_k,
                index_n_heads=indexer.num_heads,
                index_head_dim=indexer.head_dim,
            )
        )
    else:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: PLC0415

        model = DeepseekV3ForCausalLM(DeepseekV3Config(**fields))
    mine = dict(tensors(ours))
    with torch.no_grad():
        for name, tensor in tensors(model):
            if "inv_freq" not in name:
                tensor.copy_(mine[our_name(name)])
    return model


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What their configurations of V3 and V3.2 call our keys."""
    mla, moe = config.mla, config.moe
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": mla.rope_theta}
    if mla.yarn is not None:
        rope |= {"rope_type": "yarn", **asdict(mla.yarn)}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "n_shared_experts": moe.num_shared_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": config.num_dense_layers,
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": 192,
        "n_group": moe.num_expert_groups,
        "topk_group": moe.num_groups_per_token,
        "norm_topk_prob": True,
    }


def gradients(model: nn.Module, logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Of everything that the language loss moves: all but the indexers."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = {name: p for name, p in model.named_parameters() if "indexer" not in name}
    grads = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, grads, strict=True))


GROUPED = MoeConfig(
    num_experts=8,
    num_experts_per_token=3,
    num_expert_groups=4,
    num_groups_per_token=2,
    expert_intermediate_size=16,
)
CASES = {
    "v3": CONFIG,
    "v3 groups": replace(CONFIG, moe=GROUPED),
    "v3 yarn": replace(CONFIG, mla=replace(CONFIG.mla, yarn=YARN)),
    "v3 no query rank": replace(CONFIG, mla=replace(CONFIG.mla, q_lora_rank=None)),
    "v3.2": replace(CONFIG, attention="dsa", indexer=INDEXER),
    "v3.2 gathered": replace(CONFIG, attention="dsa", indexer=replace(INDEXER, top_k=8)),
    "v3.2 yarn": replace(
        CONFIG, attention="dsa", indexer=INDEXER, mla=replace(CONFIG.mla, yarn=YARN)
    ),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_logits_and_gradients_equal_transformers(config: ModelConfig) -> None:
    moe = replace(config.moe, routed_scaling_factor=2.5)
    ours = build(replace(config, moe=moe), noise=0.1)
    for layer in ours.moe_layers():
        nn.init.normal_(layer.router.get_buffer("expert_bias"), std=0.1)
    theirs = transformers_model(ours)
    ids = torch.randint(0, 64, (2, 150), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(150).expand(2, 150)

    found = ours(ids, positions, torch.zeros_like(ids)).logits
    wanted = theirs(input_ids=ids).logits
    assert relative_error(found, wanted) < 2e-5

    mine, reference = gradients(ours, found, ids), gradients(theirs, wanted, ids)
    assert mine.keys() == {our_name(name) for name in reference}
    for name, grad in reference.items():
        assert relative_error(mine[our_name(name)], grad) < 2e-5, name
