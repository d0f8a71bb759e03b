from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.train.model.images import ENCODER, SEEING, SEEING_FULL
from tests.unit.train.model.tiny import FULL, MEMORY, with_changes
from train.config import OptimConfig
from train.model.config import ModelConfig
from train.model.roles import parameter_roles
from train.model.transformer import Transformer
from train.optim.build import build_optimizer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(FULL)


def kinds(model: Transformer) -> dict[str, str]:
    return {name: role.kind for name, role in parameter_roles(model).items()}


def test_what_the_report_of_v4_leaves_on_adamw_is_no_matrix(model: Transformer) -> None:
    found = kinds(model)
    assert found["embedding.weight"] == "embedding"
    assert found["head.weight"] == "head"
    assert found["layers.1.engram.table.weight"] == "engram"
    others = {name for name, kind in found.items() if kind == "vector"}
    ends = {name.rsplit(".", 1)[-1] for name in others}
    assert ends == {"weight", "alpha", "bias", "query_norm", "key_norm", "conv_norm", "conv"}
    assert all("norm" in name for name in others if name.endswith(".weight"))


def test_fused_matrices_are_named_one_by_one(model: Transformer) -> None:
    roles = parameter_roles(model)
    width = FULL.moe.expert_intermediate_size
    assert roles["layers.1.ffn.experts.gate_up"].rows == (width, width)
    assert roles["layers.1.ffn.experts.down"].rows == (FULL.hidden_size,)
    streams = FULL.hyper_connection.num_streams
    assert roles["layers.1.engram.key.weight"].rows == (FULL.hidden_size,) * streams
    assert roles["layers.0.attention_site.phi"].rows == (2 * streams + streams**2,)


HYBRID = with_changes(FULL, attention="v4_hybrid", mtp_kind="v4")


def test_grouped_projections_and_fused_attention_are_taken_apart() -> None:
    roles = parameter_roles(Transformer(HYBRID))
    groups = HYBRID.compressed.output_groups
    assert roles["layers.0.attention.o_a.weight"].rows == (
        (HYBRID.compressed.output_lora_rank,) * groups
    )
    assert roles["layers.1.attention.compressor.pool.logits"].kind == "vector"
    roles = parameter_roles(Transformer(SEEING))
    hidden = ENCODER.hidden_size
    assert roles["vision.encoder.layers.0.qkv.weight"].rows == (hidden,) * 3


CONFIGS = [
    with_changes(FULL, residual="plain"),
    with_changes(FULL, residual="hc"),
    with_changes(FULL, residual="mhc_single_pass"),
    with_changes(FULL, attention="dsa"),
    with_changes(FULL, engram=replace(MEMORY, conv_kernel_size=0)),
    HYBRID,
    SEEING_FULL,
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_every_parameter_has_a_role(config: ModelConfig) -> None:
    model = Transformer(config)
    roles = parameter_roles(model)
    assert roles.keys() == {name for name, _ in model.named_parameters()}
    # What is multiplied with activations is a matrix, and the rest is not.
    matrices = {name for name, role in roles.items() if role.kind == "matrix"}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ends = {name.rsplit(".", 1)[-1] for name in matrices - linear}
    assert linear <= matrices
    assert ends <= {"phi", "theta", "gate_up", "down", "weight"}


def test_an_unknown_parameter_of_two_dimensions_is_refused() -> None:
    model = Transformer(FULL)
    model.extra = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="no role for \\['extra'\\]"):
        parameter_roles(model)


def updated_by(model: Transformer, **changes: Any) -> dict[str, tuple[set[str], float, float]]:
    """For each parameter: its states, decay, and the learning rate at a schedule's 1."""
    parameters = dict(model.named_parameters())
    optimizers = build_optimizer(
        parameters,
        parameter_roles(model),
        OptimConfig(**changes),
        iteration_dtype=torch.float32,
    )
    optimizers.set_learning_rate(1.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for optimizer in optimizers._optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                states = set(optimizers.state_of(parameter))
                found[names[id(parameter)]] = (states, group.get("weight_decay", 0.0), group["lr"])
    assert found.keys() == parameters.keys()
    return found


ADAMW, MOMENTUM = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


def test_adamw_groups(model: Transformer) -> None:
    found = updated_by(model)
    assert all(states == ADAMW for states, _, _ in found.values())
    for name, kind in kinds(model).items():
        _, decay, rate = found[name]
        assert decay == (0.0 if kind in ("vector", "engram") else 0.1)
        assert rate == (5.0 if kind == "engram" else 1.0)


def test_muon_takes_the_matrices_and_sinkhorn_the_tables_that_are_named(model: Transformer) -> None:
    found = updated_by(
        model, optimizer="muon", table_optimizer="sinkhorn", tables=("engram", "head")
    )
    for name, kind in kinds(model).items():
        states, decay, rate = found[name]
        assert states == (MOMENTUM if kind in ("matrix", "engram", "head") else ADAMW), name
        assert decay == (0.1 if kind in ("matrix", "embedding") else 0.0), name
        assert rate == (5.0 if kind == "engram" else 1.0)
