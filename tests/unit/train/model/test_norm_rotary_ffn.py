import math
from dataclasses import asdict

import pytest
import torch

from train.model.attention.config import YarnConfig
from train.model.ffn import FeedForward, swiglu
from train.model.norm import RMSNorm
from train.model.rotary import rotary_tables, rotate, rotate_halves, softmax_correction, stretch


def test_rms_norm_follows_its_formula_and_accumulates_bf16_in_fp32() -> None:
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(3, 5, 64) * 7
    wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    low = x.bfloat16()
    rounded = norm.bfloat16()(low)
    exact = low.double() / low.double().pow(2).mean(-1, keepdim=True).sqrt() * norm.weight.double()
    # Two roundings to bf16 (2^-9 each); a bf16 sum of 64 squares would be off by several percent.
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-7, atol=1e-6)


def test_rotation_is_the_complex_product() -> None:
    positions = torch.tensor([[0, 1, 7, 250]])
    x = torch.randn(1, 4, 3, 6)
    turned = rotate(x, *rotary_tables(positions, 6, 100.0))
    for token, position in enumerate([0, 1, 7, 250]):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            factor = complex(math.cos(angle), math.sin(angle))
            for head in range(3):
                even, odd = x[0, token, head, 2 * pair : 2 * pair + 2].tolist()
                product = complex(even, odd) * factor
                found = turned[0, token, head, 2 * pair : 2 * pair + 2]
                torch.testing.assert_close(
                    found, torch.tensor([product.real, product.imag]), rtol=1e-4, atol=1e-5
                )


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        tables = [
            rotary_tables(torch.tensor([[p]]), 8, 10000.0) for p in (query_position, key_position)
        ]
        return float((rotate(q, *tables[0]) * rotate(k, *tables[1])).sum())

    assert math.isclose(score(9, 4), score(105, 100), rel_tol=1e-4, abs_tol=1e-5)
    assert not math.isclose(score(9, 4), score(9, 5), rel_tol=1e-3)


def test_swiglu_clamps_the_gate_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([20.0, -20.0, 1.0])
    up = torch.tensor([-30.0, 30.0, 2.0])
    silu = [x / (1 + math.exp(-x)) for x in (10.0, -20.0, 1.0)]
    wanted = torch.tensor([silu[0] * -10, silu[1] * 10, silu[2] * 2])
    torch.testing.assert_close(swiglu(gate, up, 10.0), wanted)
    free = swiglu(gate, up, None)
    torch.testing.assert_close(free[0], torch.tensor(-600.0))


def test_feed_forward_is_down_of_swiglu() -> None:
    ffn = FeedForward(6, 10, None)
    x = torch.randn(2, 3, 6)
    gate, up = x @ ffn.gate.weight.T, x @ ffn.up.weight.T
    torch.testing.assert_close(ffn(x), (gate * gate.sigmoid() * up) @ ffn.down.weight.T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mscale", [(1.0, 1.0), (0.707, 1.0), (1.0, 0.707)])
@pytest.mark.parametrize("original", [32, 4096])
def test_yarn_equals_transformers(mscale: tuple[float, float], original: int) -> None:
    from transformers import DeepseekV3Config  # noqa: PLC0415
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    yarn = YarnConfig(
        factor=40.0,
        original_max_position_embeddings=original,
        mscale=mscale[0],
        mscale_all_dim=mscale[1],
    )
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, **asdict(yarn)}
    config = DeepseekV3Config(qk_rope_head_dim=16, rope_parameters=rope)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    positions = torch.tensor([[0, 3, 100, 5000]])
    angles = positions[..., None].float() * frequencies
    for found, wanted in zip(
        rotary_tables(positions, 16, 5000.0, yarn), (angles.cos(), angles.sin()), strict=True
    ):
        torch.testing.assert_close(found, wanted * scale, rtol=1e-4, atol=1e-3)
    mine = stretch(5000.0 ** -(torch.arange(0, 16, 2) / 16), 5000.0, yarn)
    torch.testing.assert_close(mine, frequencies, rtol=1e-6, atol=0)
    assert softmax_correction(yarn) == (0.1 * mscale[1] * math.log(40.0) + 1) ** 2
    assert softmax_correction(None) == 1


def test_halves_are_the_interleaved_pairs_with_channels_permuted() -> None:
    x, tables = torch.randn(2, 3, 2, 8), rotary_tables(torch.arange(6).view(2, 3), 8, 100.0)
    order = torch.arange(8).view(2, 4).T.flatten()
    torch.testing.assert_close(
        rotate_halves(x, *tables)[..., order], rotate(x[..., order], *tables)
    )
