"""How many parameters a model has, and how many of them a token uses; read off the model itself."""

from dataclasses import dataclass

import torch
from torch import nn

from train.model.config import ModelConfig
from train.model.embedding import TokenEmbedding
from train.model.engram import EngramTable
from train.model.moe.experts import Experts
from train.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model without its MTP blocks, which published totals leave out."""

    total: int
    """Everything."""
    active: int
    """What is multiplied with for a token of text: no rows of tables, the token's experts only."""
    routed_experts: int
    """Routed experts, all of them."""
    engram_tables: int
    """Rows of the memories."""
    vision: int
    """The tower, which text does not pass."""
    mtp: int
    """Blocks of multi-token prediction, besides the total."""

    @property
    def engram_share(self) -> float:
        """Memory over all sparse parameters: routed experts and memory."""
        return self.engram_tables / (self.routed_experts + self.engram_tables)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Build the model on the meta device, without memory, and count."""
    with torch.device("meta"):
        model = Transformer(config)
    mtp = _size(model.mtp)
    experts = _size_of_all(model, Experts) - _size_of_all(model.mtp, Experts)
    tables = _size_of_all(model, EngramTable)
    embeddings = _size_of_all(model, TokenEmbedding)
    vision = _size(model.vision) if model.vision is not None else 0
    total = _size(model) - mtp
    used = experts * config.moe.num_experts_per_token // config.moe.num_experts
    return ParameterCount(
        total=total,
        active=total - tables - embeddings - vision - experts + used,
        routed_experts=experts,
        engram_tables=tables,
        vision=vision,
        mtp=mtp,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size_of_all(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(_size(part) for part in module.modules() if isinstance(part, kind))
