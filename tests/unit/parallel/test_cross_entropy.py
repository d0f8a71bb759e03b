from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel import cross_entropy
from parallel.cross_entropy import summed_cross_entropy
from tests.unit.train.model.tiny import relative_error


@pytest.fixture
def device() -> str:
    """Others call these tests with theirs."""
    return "cpu"


def several_chunks(logits: torch.Tensor) -> Any:
    return (slice(start, start + 5) for start in range(0, len(logits), 5))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)]
)
def test_loss_and_gradient_equal_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float, device: str
) -> None:
    monkeypatch.setattr(cross_entropy, "_chunks", several_chunks)
    torch.manual_seed(0)
    logits = (30 * torch.randn(2, 9, 50)).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 50, (2, 9)).to(device)
    labels[0, 3:6] = -100
    found = summed_cross_entropy(logits, labels)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = F.cross_entropy(logits.to(wide).flatten(0, 1), labels.flatten(), reduction="sum")
    assert found.dtype == wide
    assert relative_error(found, wanted) < bound
    mine, theirs = (torch.autograd.grad(x / 7, logits)[0] for x in (found, wanted))
    assert mine.dtype == dtype
    assert relative_error(mine.double(), theirs.double()) < bound
    assert mine[0, 3:6].abs().sum() == 0


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    total = summed_cross_entropy(logits, torch.full((1, 3), -100))
    assert total == 0
    assert torch.autograd.grad(total, logits)[0].abs().sum() == 0
