import math
from hashlib import blake2b
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.initialize import Init, fill_parameters, standard_normal
from parallel.shards import held_part


def test_any_slice_equals_the_whole() -> None:
    whole = standard_normal(3, "layers.0.weight", 0, 20_000)
    for start, stop in ((0, 1), (1, 8), (4095, 4097), (5, 5), (4096, 8192), (9_999, 20_000)):
        part = standard_normal(3, "layers.0.weight", start, stop)
        assert torch.equal(part, whole[start:stop])


def test_values_are_those_of_the_definition() -> None:
    """Element by element with the standard library's inverse, from its own stream of bits."""
    key = int.from_bytes(blake2b(b"7\0w", digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(5000)
    values = standard_normal(7, "w", 4990, 5000)
    for value, raw in zip(values.tolist(), bits[4990:].tolist(), strict=True):
        expected = NormalDist().inv_cdf(((raw >> 11) + 0.5) / 2**53)
        assert value == pytest.approx(expected, rel=1e-9)


def test_values_are_normal_and_independent_between_names_and_seeds() -> None:
    n = 200_000
    values = standard_normal(0, "a", 0, n)
    grid = torch.linspace(-4, 4, 33, dtype=torch.float64)
    empirical = (values[:, None] <= grid).double().mean(0)
    exact = 0.5 * (1 + torch.erf(grid / math.sqrt(2)))
    # Kolmogorov-Smirnov: exceeded with probability 1e-6 for truly normal values; the seed is fixed.
    assert (empirical - exact).abs().max() < 2.7 / math.sqrt(n)
    for other in (standard_normal(0, "b", 0, n), standard_normal(1, "a", 0, n)):
        correlation = torch.corrcoef(torch.stack([values, other]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def test_fill_plain_parameters_of_every_kind() -> None:
    explicit = torch.arange(6.0).view(2, 3)
    parameters = {
        "normal": torch.empty(3, 5),
        "constant": torch.empty(4),
        "explicit": torch.empty(2, 3, dtype=torch.float64),
        "scalar": torch.empty(()),
    }
    inits = {
        "normal": Init.normal(0.02),
        "constant": Init.constant(-2.5),
        "explicit": Init.explicit(explicit),
        "scalar": Init.normal(1.0),
    }
    fill_parameters(parameters.items(), inits, seed=5)
    expected = (0.02 * standard_normal(5, "normal", 0, 15)).float().view(3, 5)
    assert torch.equal(parameters["normal"], expected)
    assert parameters["constant"].tolist() == [-2.5] * 4
    assert torch.equal(parameters["explicit"], explicit.double())
    assert parameters["scalar"].item() == standard_normal(5, "scalar", 0, 1).float().item()


def test_a_bf16_parameter_is_the_rounded_fp32_one() -> None:
    def fill(dtype: torch.dtype) -> Tensor:
        parameter = torch.empty(100, 3, dtype=dtype)
        fill_parameters([("w", parameter)], {"w": Init.normal(0.5)}, seed=0)
        return parameter

    exact = fill(torch.float64)
    assert torch.equal(fill(torch.float32), exact.float())
    assert torch.equal(fill(torch.bfloat16), exact.bfloat16())


def test_a_missing_rule_and_a_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.bias: no start value"):
        fill_parameters([("layers.3.bias", torch.empty(2))], {}, seed=0)
    with pytest.raises(
        ValueError, match=r"b: explicit values have shape \(3,\), the parameter \(2,\)"
    ):
        fill_parameters([("b", torch.empty(2))], {"b": Init.explicit(torch.ones(3))}, seed=0)


def test_a_plain_tensor_is_owned_whole() -> None:
    assert held_part(torch.empty(7, 2)) == (range(7), range(2))
    assert held_part(torch.empty(())) == ()
