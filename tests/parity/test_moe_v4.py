"""The mixture of experts of transformers' DeepSeek-V4: scored and hash routing, the SwiGLU clamp."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, relative_error
from train.model.moe.config import MoeConfig
from train.model.moe.layer import MoeLayer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LIMIT = 0.05
"""Small, so that it binds."""
CONFIG = replace(
    TINY,
    router="sqrtsoftplus",
    num_dense_layers=0,
    swiglu_limit=LIMIT,
    moe=MoeConfig(
        num_experts=8,
        num_experts_per_token=3,
        expert_intermediate_size=16,
        num_hash_layers=1,
        routed_scaling_factor=1.5,
    ),
)
NAMES = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.expert_bias",
    "gate.tid2eid": "router.expert_table",
    "experts.gate_up_proj": "experts.gate_up",
    "experts.down_proj": "experts.down",
    "shared_experts.gate_proj.weight": "shared.gate.weight",
    "shared_experts.up_proj.weight": "shared.up.weight",
    "shared_experts.down_proj.weight": "shared.down.weight",
}


def pair(layer: int) -> tuple[MoeLayer, nn.Module]:
    """Our layer and theirs with the same random weights; layer 0 routes by hash."""
    from transformers import DeepseekV4Config  # noqa: PLC0415
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (  # noqa: PLC0415
        DeepseekV4SparseMoeBlock,
    )

    moe = CONFIG.moe
    config = DeepseekV4Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=2,
        moe_intermediate_size=moe.expert_intermediate_size,
        n_routed_experts=moe.num_experts,
        n_shared_experts=1,
        num_experts_per_tok=moe.num_experts_per_token,
        routed_scaling_factor=moe.routed_scaling_factor,
        scoring_func="sqrtsoftplus",
        mlp_layer_types=["hash_moe", "moe"],
        swiglu_limit=LIMIT,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(layer)
    ours, theirs = MoeLayer(CONFIG, layer), DeepseekV4SparseMoeBlock(config, layer)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    if ours.expert_bias is not None:
        nn.init.normal_(ours.expert_bias, std=0.1)
    mine = dict([*ours.named_parameters(), *ours.named_buffers()])
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            tensor.copy_(mine[NAMES[name]])
    return ours, theirs


def run(model: nn.Module, x: Tensor, ids: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, under our names."""
    out = model(x, tokens_of(ids, ids, ids) if isinstance(model, MoeLayer) else ids)
    names = [NAMES.get(name, name) for name, _ in model.named_parameters()]
    leaves = [x, *model.parameters()]
    grads = torch.autograd.grad(out, leaves, direction)
    return dict(zip(["out", "x", *names], [out, *grads], strict=True))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 40, CONFIG.hidden_size, requires_grad=True)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 40))
    return x, ids, torch.randn_like(x)


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_equals_transformers_whose_shared_expert_is_not_clamped(layer: int) -> None:
    ours, theirs = pair(layer)
    theirs.shared_experts.limit = math.inf  # type: ignore[union-attr]
    batch = inputs()
    mine, reference = run(ours, *batch), run(theirs, *batch)
    assert mine.keys() == reference.keys()
    for name, wanted in reference.items():
        assert relative_error(mine[name], wanted) < 2e-5, name


def test_transformers_clamps_the_shared_expert_where_the_published_code_does_not() -> None:
    ours, theirs = pair(1)
    batch = inputs()
    assert relative_error(run(ours, *batch)["out"], run(theirs, *batch)["out"]) > 0.1
