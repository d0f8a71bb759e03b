import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.harness import run_distributed
from tests.tokens import tokens_of
from train.model.moe.config import MoeConfig, RouterKind
from train.model.moe.router import HashRouter, Router, TopKRouter, sequence_balance_loss

CONFIG = MoeConfig(num_experts=6, num_experts_per_token=2, routed_scaling_factor=1.5)
VOCAB = 100


def router(kind: RouterKind = "sigmoid", config: MoeConfig = CONFIG) -> TopKRouter:
    torch.manual_seed(0)
    made = TopKRouter(config, kind, 8)
    torch.nn.init.normal_(made.weight)
    return made


def hash_router(config: MoeConfig = CONFIG, layer: int = 0) -> HashRouter:
    torch.manual_seed(0)
    made = HashRouter(config, "hash", 8, VOCAB, layer)
    torch.nn.init.normal_(made.weight)
    return made


def route(made: Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    none = torch.zeros(x.shape[:2], dtype=torch.int64)
    indices, weights = made(x, tokens_of(none, none, ids))
    return indices, weights


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_weights_are_normalised_scores_of_the_best(kind: RouterKind) -> None:
    made = router(kind)
    x = torch.randn(1, 4, 8)
    indices, weights = route(made, x)
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
    indices, weights = route(made, x)
    assert (indices == 3).any(-1).all()
    scores = torch.sigmoid(x @ made.weight.T).gather(-1, indices)
    torch.testing.assert_close(weights, 1.5 * scores / scores.sum(-1, keepdim=True))


def test_bf16_tokens_are_scored_in_fp32() -> None:
    made, x = router(), torch.randn(2, 5, 8).bfloat16()
    _, weights = route(made, x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, route(made, x.float())[1], rtol=0, atol=0)


@pytest.mark.parametrize("made", [router(), hash_router()])
def test_counts_training_passes_once_they_have_a_gradient(made: Router) -> None:
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        route(made, x)
    torch.autograd.backward(route(made.eval(), x)[1].sum())
    route(made.train(), x)
    assert made.load_counts.sum() == 0
    for _ in range(2):
        indices, weights = route(made, x)
        torch.autograd.backward(weights.sum())
    assert (
        made.load_counts.tolist() == (2 * torch.bincount(indices.flatten(), minlength=6)).tolist()
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_counts_tokens_and_balance_loss_once(use_reentrant: bool) -> None:
    made, recomputed = router(), router()
    forwards = []
    recomputed.register_forward_pre_hook(lambda *_: forwards.append(1))
    made.balance_scale = recomputed.balance_scale = 0.3
    x = torch.randn(2, 5, 8)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.autograd.backward(route(made, here)[1].square().sum())
    _, weights = checkpoint(route, recomputed, there, use_reentrant=use_reentrant)
    torch.autograd.backward(weights.square().sum())
    assert len(forwards) == 2
    assert recomputed.load_counts.tolist() == made.load_counts.tolist()
    assert recomputed.balance_loss == made.balance_loss > 0
    torch.testing.assert_close(there.grad, here.grad, rtol=0, atol=0)


def test_balance_loss_joins_the_gradient() -> None:
    made = router()
    x = torch.randn(3, 7, 8)
    direction = torch.randn(3, 7, 2)
    made.balance_scale = 0.3
    indices, weights = route(made, x)
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
    torch.testing.assert_close(made.balance_loss, 0.3 * total.detach())


def test_balance_loss_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    even = torch.full((2, 6, 6), 0.5)
    torch.testing.assert_close(
        sequence_balance_loss(even, torch.full((2, 6), 2), 2, 6), torch.tensor(2.0)
    )
    collapsed = torch.zeros(1, 6, 6)
    collapsed[..., :2] = 1.0
    counts = torch.tensor([[6, 6, 0, 0, 0, 0]])
    torch.testing.assert_close(sequence_balance_loss(collapsed, counts, 2, 6), torch.tensor(3.0))


def test_groups_hold_all_experts_of_a_token() -> None:
    config = replace(CONFIG, num_experts=8, num_expert_groups=4, num_groups_per_token=2)
    made = router(config=replace(config, num_experts_per_token=3))
    torch.nn.init.normal_(made.expert_bias)
    x = torch.randn(3, 50, 8)
    indices, _ = route(made, x)
    scores = (torch.sigmoid(x @ made.weight.T) + made.expert_bias).flatten(0, 1)
    for token, chosen in zip(scores.tolist(), indices.flatten(0, 1).tolist(), strict=True):
        groups = sorted(range(4), key=lambda g: -(token[2 * g] + token[2 * g + 1]))[:2]
        allowed = [expert for expert in range(8) if expert // 2 in groups]
        assert set(chosen) == set(sorted(allowed, key=lambda e: -token[e])[:3])


def test_hash_routing_goes_by_token_id_and_learns_the_weights() -> None:
    made, x = hash_router(), torch.randn(2, 5, 8)
    ids = torch.randint(0, VOCAB, (2, 5))
    made.balance_scale = 0.3
    indices, weights = route(made, x, ids)
    assert torch.equal(indices, made.expert_table[ids])
    scores = torch.nn.functional.softplus(x @ made.weight.T).sqrt().gather(-1, indices)
    torch.testing.assert_close(weights, 1.5 * scores / scores.sum(-1, keepdim=True))
    torch.autograd.backward((weights * torch.randn(2, 5, 2)).sum())
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0
    assert made.balance_loss == 0  # the choice cannot be moved


def test_hash_tables_depend_on_seed_and_layer_and_travel_in_checkpoints() -> None:
    table = hash_router().expert_table
    assert torch.equal(table, hash_router().expert_table)
    assert not torch.equal(table, hash_router(layer=1).expert_table)
    assert not torch.equal(table, hash_router(replace(CONFIG, hash_seed=1)).expert_table)
    assert "expert_table" in hash_router().state_dict()
    with torch.device("meta"):
        made = HashRouter(CONFIG, "hash", 8, VOCAB, 0)
    made.to_empty(device="cpu").reset_buffers()
    assert torch.equal(made.expert_table, table)


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
