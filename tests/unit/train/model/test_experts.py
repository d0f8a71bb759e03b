import pytest
import torch

from parallel.expert import LocalDispatcher
from parallel.grouped import grouped_mm
from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, relative_error, with_changes
from train.model.moe.config import MoeConfig
from train.model.moe.experts import Experts
from train.model.moe.layer import MoeLayer

CONFIG = MoeConfig(num_experts=5, num_experts_per_token=2, expert_intermediate_size=6)


def experts() -> Experts:
    torch.manual_seed(0)
    made = Experts(CONFIG, 8, 1.0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.double()


def one_expert(made: Experts, index: int, token: torch.Tensor) -> torch.Tensor:
    gate, up = (made.gate_up[index] @ token).view(2, 6)
    out: torch.Tensor = made.down[index] @ (
        torch.nn.functional.silu(gate.clamp(max=1)) * up.clamp(-1, 1)
    )
    return out


def test_dispatch_is_the_weighted_sum_of_each_tokens_experts() -> None:
    made = experts()
    tokens = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    # Expert 2 sees no token, expert 4 all of them.
    indices = torch.tensor([[4, 0], [1, 4], [4, 3]]).repeat(3, 1)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    leaves = (tokens, weights, *made.parameters())
    found = LocalDispatcher(5)(tokens, indices, weights, made)()
    rows = [
        sum(weights[t, j] * one_expert(made, int(indices[t, j]), tokens[t]) for j in range(2))
        for t in range(9)
    ]
    wanted = torch.stack([torch.as_tensor(row) for row in rows])
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(found)
    mine = torch.autograd.grad(found, leaves, direction)
    theirs = torch.autograd.grad(wanted, leaves, direction)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert mine[2][2].abs().sum() == 0


def test_no_rows_at_all_stay_in_the_graph() -> None:
    made = experts()
    rows = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    out = made(rows, torch.zeros(5, dtype=torch.int64))
    assert out.shape == (0, 8)
    grads = torch.autograd.grad(out.sum(), (rows, *made.parameters()))
    assert all(grad.abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("counts", [[3, 0, 32, 5, 0], [0, 0, 0, 0, 0]])
def test_grouped_products_equal_the_loop(
    counts: list[int], dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(sum(counts), 16).to(dtype), torch.randn(5, 24, 16).to(dtype)
    results = []
    # fp64 takes the loop.
    for leaves in ((rows, weights), (rows.double(), weights.double())):
        made = [leaf.requires_grad_() for leaf in leaves]
        out = grouped_mm(*made, torch.tensor(counts))  # type: ignore[call-arg]
        # An expanded gradient, which torch's own backward refuses.
        results.append([out, *torch.autograd.grad(out.sum(), made)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_padded_and_grouped_dispatch_equals_fp64(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    config = MoeConfig(num_experts=5, num_experts_per_token=2, expert_intermediate_size=24)
    made = Experts(config, 16, None)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens, weights = torch.randn(50, 16), torch.rand(50, 2)
    indices = torch.rand(50, 4).topk(2).indices  # none goes to expert 4
    results = []
    for kind in (dtype, torch.float64):
        made.to(kind)
        leaves = (tokens.to(kind).requires_grad_(), weights.clone().requires_grad_())
        out = LocalDispatcher(5)(leaves[0], indices, leaves[1], made)()
        grads = torch.autograd.grad(out.square().sum(), (*leaves, *made.parameters()))
        results.append([out, *grads])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found.double(), wanted.double()) < bound


@pytest.mark.parametrize("num_shared", [0, 2])
def test_layer_adds_the_shared_expert_and_takes_its_statistics(num_shared: int) -> None:
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=4, num_shared_experts=num_shared, expert_intermediate_size=6)
    layer = MoeLayer(with_changes(TINY, moe=moe), 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, ids = torch.randn(2, 3, 32), torch.zeros(2, 3, dtype=torch.int64)
    layer.balance_scale = 0.5
    found = layer(x, tokens_of(ids, ids))
    torch.autograd.backward(found.sum())
    layer.dispatch = lambda tokens, *_: lambda: torch.zeros_like(tokens)
    shared = layer(x, tokens_of(ids, ids))
    if layer.shared is None:
        assert shared.abs().sum() == 0
    else:
        assert layer.shared.gate.weight.shape == (12, 32)
        torch.testing.assert_close(shared, layer.shared(x))
    assert not torch.equal(found, shared)
    assert int(layer.take_load_counts().sum()) == 6 * 2
    assert float(layer.take_balance_loss()) > 0
    assert int(layer.take_load_counts().sum()) == 0
    assert float(layer.take_balance_loss()) == 0
