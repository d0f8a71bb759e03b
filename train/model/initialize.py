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
from train.model.attention.mla import KeyValueExpansion
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.embedding import OutputHead, TokenEmbedding
from train.model.engram import Engram, EngramTable
from train.model.engram_hash import NgramHash
from train.model.hyper_connection import GatedReadOut, HyperConnection, ManifoldHyperConnection
from train.model.moe.experts import Experts
from train.model.moe.router import Router
from train.model.norm import RMSNorm
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
    normal, one, zero = (
        Init.normal(config.initializer_range),
        Init.constant(1.0),
        Init.constant(0.0),
    )
    rules: dict[str, Init] = {}
    match module:
        case RMSNorm():
            rules = {"weight": one}
        case nn.Linear() | KeyValueExpansion() | TokenEmbedding() | OutputHead() | Router():
            rules = {"weight": normal}
        case AttentionSink() | SlotPool():
            rules = {"logits": zero}
        case nn.LayerNorm():
            rules = {"weight": one, "bias": zero}
        case EngramTable():
            rules = {"weight": zero}
        case Experts():
            rules = {"gate_up": normal, "down": normal}
        case HyperConnection() | ManifoldHyperConnection() | GatedReadOut():
            rules = _connection_init(module, config.hyper_connection)
        case Engram():
            rules = {"query_norm": one, "key_norm": one}
            if module.conv is not None:
                rules |= {"conv_norm": one, "conv": zero}
    return rules


def _connection_init(
    module: HyperConnection | ManifoldHyperConnection | GatedReadOut, config: HyperConnectionConfig
) -> dict[str, Init]:
    """Rules for the maps between streams."""
    streams, phi = config.num_streams, Init.normal(config.phi_init_std)
    match module:
        case HyperConnection():
            rules = {"theta": Init.constant(0.0)}
            bias = hc_bias(streams, module.site_index)
        case ManifoldHyperConnection():
            rules = {"phi": phi}
            bias = mhc_bias(streams, config.residual_bias_init)
        case GatedReadOut():
            rules = {"phi": phi}
            bias = mean_gate_bias(streams)
    return rules | {"alpha": Init.constant(config.gate_init), "bias": Init.explicit(bias)}


def hc_bias(streams: int, site_index: int) -> Float[Tensor, "maps"]:
    """Static maps of HC: read stream `site_index mod n`, write to all, mix nothing."""
    pre = torch.zeros(streams)
    pre[site_index % streams] = 1.0
    return torch.cat([pre, torch.ones(streams), torch.eye(streams).flatten()])


def mhc_bias(streams: int, diagonal: float) -> Float[Tensor, "maps"]:
    """Logits of mHC's static maps: read the mean (1/n each), write 1, mix Sinkhorn(exp(c I))."""
    pre = mean_gate_bias(streams)
    return torch.cat([pre, torch.zeros(streams), diagonal * torch.eye(streams).flatten()])


def mean_gate_bias(streams: int) -> Float[Tensor, "streams"]:
    """Logits of gates 1/n each: a sum of streams by these is their mean."""
    return torch.full((streams,), -math.log(streams - 1))
