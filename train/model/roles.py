"""What each parameter is: a weight matrix, a table, or a vector; `train.optim` groups by it.

A matrix is what a paper's equation writes as one: tensors that are fused or stacked for speed are
taken apart here. New modules with parameters of two or more dimensions add a rule.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from train.model.attention.compressed import GroupedLinear
from train.model.attention.compressor import Compressor, SlotPool
from train.model.attention.mla import KeyValueExpansion
from train.model.embedding import OutputHead, TokenEmbedding
from train.model.engram import Engram, EngramTable
from train.model.hyper_connection import GatedReadOut, HyperConnection, ManifoldHyperConnection
from train.model.moe.experts import Experts
from train.model.moe.router import Router
from train.model.multimodal.encoder import VisionBlock
from train.model.transformer import Transformer


@dataclass(frozen=True)
class Role:
    """What a parameter is to an optimizer."""

    kind: Literal["matrix", "vector", "engram", "embedding", "head"]
    """vector: norms, biases, gates, convolution taps, whatever their shape."""
    rows: tuple[int, ...] = ()
    """Of a matrix: rows of each matrix that is stacked on the last dimension but one, top to bottom;
    all leading dimensions count matrices (experts)."""


def parameter_roles(model: Transformer) -> dict[str, Role]:
    """The role of every parameter, by name."""
    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        for name, role in _own_roles(module).items():
            # A module comes before its children: what it says about them counts.
            roles.setdefault(f"{prefix}.{name}" if prefix else name, role)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    unknown = [name for name, shape in shapes.items() if len(shape) >= 2 and name not in roles]
    assert not unknown, f"no role for {unknown}"
    for name, role in roles.items():
        assert role.kind != "matrix" or sum(role.rows) == shapes[name][-2], (name, role)
    return {name: roles.get(name, Role("vector")) for name in shapes}


def _own_roles(module: nn.Module) -> dict[str, Role]:
    """Rules for the parameters that `module` holds, itself or in children."""
    roles: dict[str, Role] = {}
    match module:
        case EngramTable() | TokenEmbedding() | OutputHead():
            roles = {"weight": _table(module)}
        case GroupedLinear():
            roles = {"weight": _stacked(module.groups, module.out_features // module.groups)}
        case nn.Linear() | KeyValueExpansion() | Router():
            roles = {"weight": _stacked(1, len(module.weight))}
        case Experts():
            _, hidden, width = module.down.shape
            roles = {"gate_up": _stacked(2, width), "down": _stacked(1, hidden)}
        case VisionBlock():
            roles = {"qkv.weight": _stacked(3, module.qkv.in_features)}
        case Compressor():
            width = len(module.norm.weight)
            series = _stacked(module.kv.out_features // width, width)
            roles = {"kv.weight": series, "gate.weight": series}
        case SlotPool():
            roles = {"logits": Role("vector")}
        case Engram():
            vectors = ("query_norm", "key_norm", "conv_norm", "conv")
            roles = {"key.weight": _stacked(*module.query_norm.shape)}
            roles |= dict.fromkeys(vectors, Role("vector"))
        case _:
            roles = _connection_roles(module)
    return roles


def _connection_roles(module: nn.Module) -> dict[str, Role]:
    """Rules for the maps of the residual streams."""
    match module:
        case ManifoldHyperConnection() | GatedReadOut():
            # One matrix, as V4 stores it. The gradient of its rows for H_res is 0 while all streams
            # are equal, as at the start: alone, Muon would blow its rounding up to a full step.
            return {"phi": _stacked(1, len(module.phi))}
        case HyperConnection():
            return {"theta": _stacked(1, len(module.theta))}
    return {}


def _table(module: EngramTable | TokenEmbedding | OutputHead) -> Role:
    match module:
        case EngramTable():
            return Role("engram")
        case TokenEmbedding():
            return Role("embedding")
        case OutputHead():
            return Role("head")


def _stacked(matrices: int, rows: int) -> Role:
    return Role("matrix", (rows,) * matrices)
