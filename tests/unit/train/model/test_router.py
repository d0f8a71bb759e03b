import math
from dataclasses import replace

import pytest
import torch

from tests.harness import run_distributed
from train.model.moe.config import MoeConfig, RouterKind
from train.model.moe.router import Router, sequence_balance_loss

CONFIG = MoeConfig(num_experts=6, num_experts_per_token=2, routed_scaling_factor=1.5)


def router(kind: RouterKind = "sigmoid", config: MoeConfig = CONFIG) -> Router:
    torch.manual_seed(0)
    made = Router(config, kind, 8)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_weights_are_normalised_scores_of_the_best(kind: RouterKind) -> None:
    made = router(kind)
    x = torch.randn(1, 4, 8)
    indices, weights = made(x)
    for token in range(4):
        logits = [float(made.weight[e].detach() @ x[0, token]) for e in range(6)]
        total = sum(math.exp(z) for z in logits)
        scores = {
            "softmax": [math.exp(z) / total for z in logits],
            "sigmoid": [1 / (1 + math.exp(-z)) for z in logits],
            "sqrtsoftplus": [math.sqrt(math.log1p(math.exp(z))) for z in logits],
        }[kind]
        best = sorted(range(6), key=lambda e: -scores[e])[:2]
        chosen = indices[0, token].tolist()
        assert set(chosen) == set(best)
        wanted = [1.5 * scores[e] / (scores[best[0]] + scores[best[1]]) for e in chosen]
        torch.testing.assert_close(weights[0, token].detach(), torch.tensor(wanted))


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    made = router()
    x = torch.randn(2, 5, 8)
    made.expert_bias[3] = 100.0
    indices, weights = made(x)
    assert (indices == 3).any(-1).all()
    scores = torch.sigmoid(x @ made.weight.T).gather(-1, indices)
    torch.testing.assert_close(weights, 1.5 * scores / scores.sum(-1, keepdim=True))


def test_bf16_tokens_are_scored_in_fp32() -> None:
    made, x = router(), torch.randn(2, 5, 8).bfloat16()
    _, weights = made(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, made(x.float())[1], rtol=0, atol=0)


def test_counts_only_training_passes_with_gradients() -> None:
    made, x = router(), torch.randn(2, 5, 8)
    with torch.no_grad():
        made(x)
    made.eval()(x)
    assert made.load_counts.sum() == 0
    made.train()(x)
    indices, _ = made(x)
    assert (
        made.load_counts.tolist() == (2 * torch.bincount(indices.flatten(), minlength=6)).tolist()
    )


def test_balance_loss_joins_the_gradient() -> None:
    made = router()
    x = torch.randn(3, 7, 8)
    direction = torch.randn(3, 7, 2)
    made.balance_scale = 0.3
    indices, weights = made(x)
    (found,) = torch.autograd.grad((weights * direction).sum(), made.weight)

    # Equations 17-20 of DeepSeek-V3 written out, one sequence at a time.
    total = torch.zeros(())
    for sequence in range(3):
        scores = torch.sigmoid(x[sequence] @ made.weight.T)
        share = scores / scores.sum(-1, keepdim=True)
        for expert in range(6):
            frequency = (indices[sequence] == expert).sum() * 6 / (2 * 7)
            total = total + frequency * share[:, expert].sum() / 7
    scores = torch.sigmoid(x @ made.weight.T).gather(-1, indices)
    plain = (1.5 * scores / scores.sum(-1, keepdim=True) * direction).sum()
    (wanted,) = torch.autograd.grad(plain + 0.3 * total, made.weight)
    torch.testing.assert_close(found, wanted)
    assert made.balance_loss is not None
    torch.testing.assert_close(made.balance_loss, 0.3 * total.detach())


def test_balance_loss_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    even = torch.full((2, 6, 6), 0.5)
    torch.testing.assert_close(
        sequence_balance_loss(even, torch.full((2, 6), 2), 2), torch.tensor(2.0)
    )
    collapsed = torch.zeros(1, 6, 6)
    collapsed[..., :2] = 1.0
    counts = torch.tensor([[6, 6, 0, 0, 0, 0]])
    torch.testing.assert_close(sequence_balance_loss(collapsed, counts, 2), torch.tensor(3.0))


def megatron_bias(rank: int) -> list[float]:
    from megatron.core import parallel_state  # noqa: PLC0415
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias  # noqa: PLC0415

    parallel_state.initialize_model_parallel()
    load = torch.tensor([4.0, 0.0, 9.0, 1.0, 4.0, 6.0])
    updated = get_updated_expert_bias(load, torch.linspace(-1, 1, 6), 0.01)
    return [float(value) for value in updated]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_bias_update_equals_megatron_core() -> None:
    made = router(config=replace(CONFIG, bias_update_speed=0.01))
    made.expert_bias.copy_(torch.linspace(-1, 1, 6))
    made.update_bias(torch.tensor([4, 0, 9, 1, 4, 6]))
    (wanted,) = run_distributed(megatron_bias, 1)
    assert made.expert_bias.tolist() == wanted
    assert made.expert_bias[0] == torch.linspace(-1, 1, 6)[0]  # the mean load is exactly 4
