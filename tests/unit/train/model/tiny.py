"""Small models and packed batches for the model's tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.initialize import fill_parameters
from train.model.attention.config import MlaConfig
from train.model.config import EngramConfig, ModelConfig
from train.model.initialize import parameter_init
from train.model.moe.config import MoeConfig
from train.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    intermediate_size=48,
    num_attention_heads=2,
    mla=MlaConfig(
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=MoeConfig(num_experts=4, expert_intermediate_size=16),
)
MEMORY = EngramConfig(layers=(1,), num_heads=2, rows_per_head=50, head_dim=8)
FULL = replace(TINY, engram=MEMORY, mtp_depth=1)


def build(config: ModelConfig, *, noise: float = 0.0, seed: int = 0) -> Transformer:
    """A model at its initial values; `noise` is added to all, so that nothing is zero or equal."""
    model = Transformer(config)
    fill_parameters(model.named_parameters(), parameter_init(model), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def packed(
    lengths: tuple[int, ...], batch: int = 2, vocab: int = 64, seed: int = 0
) -> list[Tensor]:
    """input_ids, position_ids and document_ids of sequences of documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return [ids, positions.expand_as(ids).clone(), documents.expand_as(ids).clone()]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm())


def with_changes(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`dataclasses.replace` with untyped values, for parametrised tests."""
    return replace(config, **changes)
