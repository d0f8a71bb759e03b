"""What every parameter starts as; called by `train.build` before and after the model is sharded.

Values depend on a parameter's name and the seed only (`parallel.initialize`), so that every layout
starts from the same model.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from parallel.initialize import Init
from train.model.attention.compressed import AttentionSink
from train.model.attention.compressor import SlotPool
from train.model.config import ModelConfig
from train.model.embedding import OutputHead, TokenEmbedding
from train.model.engram import Engram, EngramTable
from train.model.engram_hash import NgramHash
from train.model.moe.experts import Experts
from train.model.moe.router import Router
from train.model.norm import RMSNorm
from train.model.residual import HyperConnection, ManifoldHyperConnection
from train.model.transformer import Transformer


def parameter_init(model: Transformer) -> dict[str, Init]:
    """Initial value of every parameter, by name.

    Matrices are normal with `initializer_range`, norms 1. Residual sites and the memory start such
    that the model computes the plain pre-norm network without memory: see `residual`, `engram`.
    """
    inits = {
        f"{prefix}.{name}" if prefix else name: init
        for prefix, module in model.named_modules()
        for name, init in _own_init(module, model.config).items()
    }
    names = {name for name, _ in model.named_parameters()}
    assert inits.keys() == names, f"no or too many rules for {sorted(inits.keys() ^ names)}"
    return inits


def fill_buffers(model: nn.Module) -> None:
    """Write the buffers' initial values in place: needed after a model leaves the meta device."""
    for module in model.modules():
        if isinstance(module, Router | NgramHash):
            module.reset_buffers()


def _own_init(module: nn.Module, config: ModelConfig) -> dict[str, Init]:
    """Rules for the parameters that `module` itself holds."""
    connection = config.hyper_connection
    normal, one, zero = (
        Init.normal(config.initializer_range),
        Init.constant(1.0),
        Init.constant(0.0),
    )
    rules: dict[str, Init] = {}
    match module:
        case RMSNorm():
            rules = {"weight": one}
        case nn.Linear() | TokenEmbedding() | OutputHead() | Router():
            rules = {"weight": normal}
        case AttentionSink() | SlotPool():
            rules = {"logits": zero}
        case nn.LayerNorm():
            rules = {"weight": one, "bias": zero}
        case EngramTable():
            rules = {"weight": zero}
        case Experts():
            rules = {"gate_up": normal, "down": normal}
        case HyperConnection():
            bias = hc_bias(connection.num_streams, module.site_index)
            rules = {"theta": zero, "bias": Init.explicit(bias)}
            rules["alpha"] = Init.constant(connection.gate_init)
        case ManifoldHyperConnection():
            bias = mhc_bias(connection.num_streams, connection.residual_bias_init)
            rules = {"phi": Init.normal(connection.phi_init_std), "bias": Init.explicit(bias)}
            rules["alpha"] = Init.constant(connection.gate_init)
        case Engram():
            rules = {"query_norm": one, "key_norm": one, "conv_norm": one, "conv": zero}
    return rules


def hc_bias(streams: int, site_index: int) -> Float[Tensor, "maps"]:
    """Static maps of HC: read stream `site_index mod n`, write to all, mix nothing."""
    pre = torch.zeros(streams)
    pre[site_index % streams] = 1.0
    return torch.cat([pre, torch.ones(streams), torch.eye(streams).flatten()])


def mhc_bias(streams: int, diagonal: float) -> Float[Tensor, "maps"]:
    """Logits of mHC's static maps: read the mean (1/n each), write 1, mix Sinkhorn(exp(c I))."""
    pre = torch.full((streams,), -math.log(streams - 1))
    return torch.cat([pre, torch.zeros(streams), diagonal * torch.eye(streams).flatten()])
