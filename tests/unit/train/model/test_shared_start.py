"""Arms of a study start from the same model: every parameter that two of them share, bit by bit."""

import pytest
import torch
from torch import Tensor

from parallel.initialize import fill_parameters
from train.model.config import EngramConfig, ModelConfig
from train.model.initialize import parameter_init
from train.model.moe.config import MoeConfig
from train.model.transformer import Transformer

SIZES = {"hidden_size": 32, "num_layers": 3, "vocab_size": 64, "intermediate_size": 40}
MOE = MoeConfig(num_experts=4, expert_intermediate_size=16)
ENGRAM = EngramConfig(layers=(1,), rows_per_head=50, head_dim=4)


def start(seed: int = 0, moe: MoeConfig = MOE, **fields: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SIZES, moe=moe, **fields))  # type: ignore[arg-type]
    inits = parameter_init(model)
    model.to_empty(device="cpu")
    fill_parameters(model.named_parameters(), inits, seed=seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_residuals_and_memory_leave_the_rest_of_the_model_alone(seed: int) -> None:
    plain = start(seed, residual="plain")
    for kind in ("hc", "mhc", "mhc_single_pass"):
        for engram in (None, ENGRAM):
            other = start(seed, residual=kind, engram=engram)
            assert plain.keys() < other.keys()
            assert all(torch.equal(other[name], value) for name, value in plain.items())


def test_further_experts_leave_the_first_ones_alone() -> None:
    few = start()
    many = start(moe=MoeConfig(num_experts=7, expert_intermediate_size=16))
    assert few.keys() == many.keys()
    grown = 0
    for name, value in few.items():
        assert torch.equal(many[name][: len(value)], value), name
        grown += many[name].shape != value.shape
    assert grown == 2 * 3  # router, gate and up, and down of two layers


def test_seeds_differ() -> None:
    first, second = start(0), start(1)
    # The maps of the streams have explicit biases.
    drawn = [n for n, value in first.items() if value.std() > 0 and not n.endswith(".bias")]
    assert len(drawn) > 10
    assert not any(torch.equal(first[name], second[name]) for name in drawn)
