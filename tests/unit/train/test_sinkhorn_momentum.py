import pytest
import torch
from torch import Tensor, nn

from train.optim.sinkhorn_momentum import SinkhornMomentum, balance_


def balance(matrix: Tensor, rows: int) -> Tensor:
    matrix = matrix.clone()
    balance_(matrix, rows)
    return matrix


def published(matrix: Tensor) -> Tensor:
    """Lines 5 to 12 of algorithm 1, word for word: the matrix is rewritten in every pass."""
    norms = matrix.norm(dim=1)
    matrix = matrix * (norms > 1e-3 * norms.mean())[:, None]
    for k in range(11):
        norms = matrix.norm(dim=1 - k % 2, keepdim=True)
        matrix = torch.where(norms > 0, matrix / norms, matrix)
    return matrix


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def table() -> Tensor:
    """Rows and columns of very different sizes, rows that nobody read and one below the threshold."""
    matrix = random(40, 6) * torch.logspace(-2, 2, 40).double()[:, None]
    matrix = matrix * torch.tensor([1e-3, 1.0, 30.0, 1.0, 0.0, 2.0])
    matrix[[3, 17]] = 0.0
    matrix[20] = 1e-6
    return matrix


def test_equals_the_published_algorithm() -> None:
    torch.testing.assert_close(balance(table(), 40), published(table()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e10])
def test_rows_have_norm_one_whatever_the_scale_even_in_fp32(scale: float) -> None:
    balanced = balance((table() * scale).float(), 40)
    norms = balanced.norm(dim=1)
    empty = torch.tensor([3, 17, 20])
    assert (norms[empty] == 0).all()
    kept = torch.ones(40, dtype=torch.bool).index_fill(0, empty, False)
    # Rows are the last to be normalized.
    mean = table().norm(dim=1).mean()
    kept &= table().norm(dim=1) > 1e-3 * mean
    torch.testing.assert_close(norms[kept], torch.ones(int(kept.sum())), rtol=1e-5, atol=0)
    torch.testing.assert_close(balanced, published(table()).float(), rtol=1e-4, atol=1e-6)


def test_columns_become_alike() -> None:
    balanced = balance(random(200, 8) * torch.logspace(-2, 2, 8).double(), 200)
    columns = balanced.norm(dim=0)
    assert columns.max() / columns.min() < 1.01


def test_nothing_to_balance() -> None:
    assert not balance(torch.zeros(4, 3), 4).any()


def test_the_step_is_algorithm_1() -> None:
    beta, gamma, lr = 0.95, 0.18, 0.1
    parameter = nn.Parameter(random(12, 4))
    group: dict[str, object] = {"params": [parameter], "learning_rate_multiplier": 5.0}
    optimizer = SinkhornMomentum([group], lr=lr, momentum=beta, update_rms=gamma)
    weight, momentum = parameter.detach().clone(), torch.zeros(12, 4).double()
    for step in range(3):
        gradient = random(step + 2, 12, 4)[step]
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = beta * momentum + (1 - beta) * gradient
        balanced = published(beta * momentum + (1 - beta) * gradient)
        weight = weight - gamma * lr * 4**0.5 * balanced
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)
    assert optimizer.state[parameter].keys() == {"momentum_buffer"}
