import numpy as np
import pytest
import torch
from torch import Tensor

from train.optim.newton_schulz import HYBRID, Coefficients, flops, orthogonalize


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(
        dtype
    )


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 9), (2, 9, 4), (1, 1, 6), (1, 24, 128)])
@pytest.mark.parametrize("coefficients", [HYBRID, HYBRID[:3]])
def test_equals_the_polynomials_of_the_singular_values(
    shape: tuple[int, int, int], coefficients: tuple[Coefficients, ...]
) -> None:
    matrices = random(*shape)
    u, s, v = np.linalg.svd(matrices.numpy(), full_matrices=False)
    s /= np.linalg.norm(s, axis=-1, keepdims=True)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ v
    np.testing.assert_allclose(orthogonalize(matrices, coefficients), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_singular_values_become_one(dtype: torch.dtype, error: float) -> None:
    found = orthogonalize(random(3, 96, 64, dtype=dtype))
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert (values - 1).abs().max() < error


def test_small_singular_values_become_one_as_the_docstring_says() -> None:
    s = torch.tensor([1.0, 0.3, 0.03, 2.1e-3], dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(torch.diag(s)[None]))
    assert (values - 1).abs().max() < 0.01


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    matrices = random(2, 6, 4)
    torch.testing.assert_close(orthogonalize(matrices * 1e-25), orthogonalize(matrices))
    assert not orthogonalize(torch.zeros(2, 3, 5)).any()
    assert orthogonalize(torch.zeros(0, 3, 5)).shape == (0, 3, 5)


def test_flops_of_a_square_matrix() -> None:
    assert flops(100, 100) == 10 * 3 * 2 * 100**3
    assert flops(10, 40) == flops(40, 10)
