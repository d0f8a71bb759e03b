import pytest
import torch

from train.monitor.routing import routing_metrics


def test_even_load_is_one_and_a_dead_expert_is_counted() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    found = routing_metrics(counts, 0.3)
    assert found["moe/load_max_over_mean"] == pytest.approx((1.0 + 4.0) / 2)
    assert found["moe/load_cv"] == pytest.approx((0.0 + 3.0**0.5) / 2)
    assert found["moe/dead_experts"] == 3
    assert found["moe/bias_abs_max"] == pytest.approx(0.3)
