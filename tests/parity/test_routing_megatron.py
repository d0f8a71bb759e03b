"""Routing against megatron-core's device-neutral functions, and where the two differ."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tokens import tokens_of
from train.model.moe.config import MoeConfig, RouterKind
from train.model.moe.router import TopKRouter, count_tokens, sequence_balance_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

EXPERTS, K, GROUPS, SCALING = 16, 4, 4, 2.5
CONFIG = MoeConfig(num_experts=EXPERTS, num_experts_per_token=K, routed_scaling_factor=SCALING)
# Their groups are scored by the best k / groups_per_token experts, ours by the best 2 as V3's code:
# with 2 of 4 groups for 4 experts that is the same.
GROUPED = replace(CONFIG, num_expert_groups=GROUPS, num_groups_per_token=2)


def megatron(router: TopKRouter, logits: Tensor) -> Tensor:
    """Weights of all experts, 0 for those not chosen."""
    from megatron.core.transformer.moe.moe_utils import (  # noqa: PLC0415
        topk_routing_with_score_function,
    )

    grouped = router.groups > 1
    weights, chosen = topk_routing_with_score_function(
        logits,
        router.k,
        num_groups=router.groups if grouped else None,
        group_topk=router.groups_per_token if grouped else None,
        scaling_factor=router.scaling,
        score_function=router.kind,
        expert_bias=router.expert_bias if router.kind == "sigmoid" else None,
    )
    assert torch.equal(weights != 0, chosen)
    spread: Tensor = weights
    return spread


def both(config: MoeConfig, kind: RouterKind) -> tuple[Tensor, Tensor]:
    """Our weights, spread over all experts, and theirs; both with their gradient to the router."""
    torch.manual_seed(0)
    router = TopKRouter(config, kind, 8)
    torch.nn.init.normal_(router.weight)
    if kind == "sigmoid":
        torch.nn.init.normal_(router.expert_bias, std=0.2)
    x = torch.randn(1, 500, 8)
    none = torch.zeros(1, 500, dtype=torch.int64)
    indices, weights = router(x, tokens_of(none, none))
    ours = torch.zeros(1, 500, EXPERTS).scatter(-1, indices, weights)[0]
    theirs = megatron(router, x[0] @ router.weight.T)
    direction = torch.randn(500, EXPERTS)
    grads = [torch.autograd.grad(w, router.weight, direction)[0] for w in (ours, theirs)]
    return torch.cat([ours, grads[0].T]), torch.cat([theirs, grads[1].T])


@pytest.mark.parametrize(
    ("config", "kind"),
    [(CONFIG, "sigmoid"), (GROUPED, "sigmoid"), (CONFIG, "softmax")],
    ids=["sigmoid with bias", "sigmoid with bias and groups", "softmax"],
)
def test_choice_weights_and_gradients_are_equal(config: MoeConfig, kind: RouterKind) -> None:
    ours, theirs = both(config, kind)
    assert torch.equal(ours[:500] != 0, theirs[:500] != 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_groups_are_scored_differently_unless_k_is_twice_the_groups_of_a_token() -> None:
    ours, theirs = both(replace(GROUPED, num_groups_per_token=1), "sigmoid")
    assert not torch.equal(ours[:500] != 0, theirs[:500] != 0)


def test_balance_loss_of_a_sequence_is_their_auxiliary_loss() -> None:
    from megatron.core.transformer.moe.moe_utils import (  # noqa: PLC0415
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
    )

    torch.manual_seed(0)
    logits = torch.randn(1, 300, EXPERTS, requires_grad=True)
    chosen, scores = compute_routing_scores_for_aux_loss(logits[0], K, "sigmoid")
    theirs = switch_load_balancing_loss_func(
        scores,
        chosen.sum(0),
        total_num_tokens=300,
        topk=K,
        num_experts=EXPERTS,
        moe_aux_loss_coeff=1.0,
    )
    sigmoid = logits.sigmoid()
    counts = count_tokens(sigmoid.topk(K).indices, EXPERTS)
    ours = sequence_balance_loss(sigmoid, counts, K, sigmoid.shape[1])
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)
