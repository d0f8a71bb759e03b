"""What each parameter is: a weight matrix, a table, or a vector; `train.optim` groups by it.

A matrix is what a paper's equation writes as one: tensors that are fused or stacked for speed are
taken apart here. New modules with parameters of two or more dimensions add a rule.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from train.model.embedding import OutputHead, TokenEmbedding
from train.model.engram import Engram, EngramTable
from train.model.moe.experts import Experts
from train.model.moe.router import Router
from train.model.residual import HyperConnection, ManifoldHyperConnection
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
        case nn.Linear():
            roles = {"weight": Role("matrix", (module.out_features,))}
        case Router():
            roles = {"weight": Role("matrix", (len(module.weight),))}
        case Experts():
            _, hidden, width = module.down.shape
            gate_up, down = Role("matrix", (width, width)), Role("matrix", (hidden,))
            roles = {"gate_up": gate_up, "down": down}
        case ManifoldHyperConnection():
            # One matrix, as V4 stores it. The gradient of its rows for H_res is 0 while all streams are
            # equal, as at the start: alone, Muon would blow its rounding up to a full step.
            roles = {"phi": Role("matrix", (sum(module.widths),))}
        case HyperConnection():
            roles = {"theta": Role("matrix", (len(module.theta),))}
        case Engram():
            streams, hidden = module.query_norm.shape
            vectors = ("query_norm", "key_norm", "conv_norm", "conv")
            roles = dict.fromkeys(vectors, Role("vector"))
            roles["key.weight"] = Role("matrix", (hidden,) * streams)
        case EngramTable():
            roles = {"weight": Role("engram")}
        case TokenEmbedding():
            roles = {"weight": Role("embedding")}
        case OutputHead():
            roles = {"weight": Role("head")}
    return roles
