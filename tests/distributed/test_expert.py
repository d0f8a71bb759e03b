"""The dispatcher against all experts on all tokens, without sorting or counts, in fp64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from parallel.collectives import exchange_rows, sum_over
from parallel.expert import AllToAllDispatcher
from tests.distributed.toy import HIDDEN, ToyExperts, dense_dispatch
from tests.harness import run_distributed
from train.model.moe.config import MoeConfig
from train.model.moe.experts import Experts

EXPERTS, K = 4, 2
ROUTINGS = ("random", "all to expert 0 and 1", "none from rank 0", "all tokens on rank 0")


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def inputs(world_size: int, routing: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens, expert indices and weights of every rank."""
    generator = torch.Generator().manual_seed(1)
    sizes = [5 + rank for rank in range(world_size)]
    if routing == "none from rank 0":
        sizes[0] = 0
    if routing == "all tokens on rank 0":
        sizes[1:] = [0] * (world_size - 1)
    tokens = [torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in sizes]
    scores = [torch.rand(n, EXPERTS, generator=generator) for n in sizes]
    if routing == "all to expert 0 and 1":
        scores = [score + torch.tensor([2.0, 2.0, 0.0, 0.0]) for score in scores]
    indices = [score.topk(K).indices for score in scores]
    weights = [torch.rand(n, K, generator=generator, dtype=torch.float64) for n in sizes]
    return tokens, indices, weights


def experts_with(rows: slice) -> ToyExperts:
    generator = torch.Generator().manual_seed(2)
    experts = ToyExperts(EXPERTS).double()
    for name, parameter in list(experts.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        experts.register_parameter(name, torch.nn.Parameter(values[rows].clone()))
    return experts


def loss_of(output: Tensor) -> Tensor:
    """Something whose gradient differs from element to element."""
    return (output.sin() * torch.arange(1, HIDDEN + 1)).sum()


def dispatched(rank: int, routing: str) -> dict[str, NDArray[Any]]:
    world_size = dist.get_world_size()
    local = EXPERTS // world_size
    experts = experts_with(slice(rank * local, (rank + 1) * local))
    token, index, weight = (values[rank] for values in inputs(world_size, routing))
    token.requires_grad_()
    weight.requires_grad_()
    dispatcher = AllToAllDispatcher(world(), EXPERTS)
    output = dispatcher(token, index, weight, experts)()
    torch.autograd.backward(loss_of(output))
    found = {"output": output.detach(), "tokens": token.grad, "weights": weight.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert all(value is not None for value in found.values())
    return {name: value.numpy().copy() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_equals_all_experts_on_all_tokens(routing: str, world_size: int) -> None:
    per_rank = run_distributed(dispatched, world_size, routing)
    got = {name: np.concatenate([rank[name] for rank in per_rank]) for name in per_rank[0]}

    tokens, indices, weights = (torch.cat(values) for values in inputs(world_size, routing))
    tokens.requires_grad_()
    weights.requires_grad_()
    experts = experts_with(slice(None))
    output = dense_dispatch(tokens, indices, weights, experts)()
    torch.autograd.backward(loss_of(output))
    expected = {"output": output.detach(), "tokens": tokens.grad, "weights": weights.grad}
    expected |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


class Scale(torch.nn.Module):
    """Multiplies every row by its expert's factor, exactly in bf16."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        factors = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=rows.dtype)
        return rows * factors.repeat_interleave(counts).unsqueeze(1)


def bf16_sum(rank: int) -> list[float]:
    """256 + 1 + 1 is 258 in fp32; in bf16 256 + 1 rounds back to 256 twice."""
    dispatcher = AllToAllDispatcher(world(), EXPERTS)
    tokens = torch.ones(1, 2, dtype=torch.bfloat16)
    indices, weights = torch.tensor([[3, 0, 1]]), torch.tensor([[32.0, 1.0, 0.5]])
    output = dispatcher(tokens, indices, weights, Scale())()
    assert output.dtype == torch.bfloat16
    return output[0].tolist()


def test_bf16_results_are_summed_in_fp32() -> None:
    assert run_distributed(bf16_sum, 1) == [[258.0, 258.0]]


def grouped(rank: int, dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    """The model's experts on this rank's half, tokens of both ranks; as fp32."""
    torch.manual_seed(0)
    experts = Experts(MoeConfig(num_experts=EXPERTS, expert_intermediate_size=8), 16, None)
    size = EXPERTS // dist.get_world_size()
    for name, parameter in list(experts.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
        local = parameter.data[rank * size : (rank + 1) * size].to(dtype)
        experts.register_parameter(name, torch.nn.Parameter(local))
    tokens = torch.randn(40, 16).to(dtype)
    indices, weights = torch.rand(40, 3).topk(K).indices, torch.rand(40, K)  # expert 3 is idle
    part = slice(0, 40) if dist.get_world_size() == 1 else slice(33 * rank, 33 + 7 * rank)
    token = tokens[part].requires_grad_()
    dispatcher = AllToAllDispatcher(world(), EXPERTS)
    output = dispatcher(token, indices[part], weights[part], experts)()
    torch.autograd.backward(output.float().square().sum())
    found = {"output": output, "tokens": token.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {n: x.detach().float().numpy().copy() for n, x in found.items() if x is not None}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_grouped_products_between_ranks(dtype: torch.dtype, bound: float) -> None:
    """In bf16 the rows of every expert are padded where they are computed, never on the wire."""
    [wanted] = run_distributed(grouped, 1, torch.float64)
    per_rank = run_distributed(grouped, 2, dtype)
    for name, value in wanted.items():
        got = np.concatenate([rank[name] for rank in per_rank])
        assert np.linalg.norm(got - value) <= bound * np.linalg.norm(value), name


def refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size=2: must divide .*num_experts=3"):
        AllToAllDispatcher(world(), 3)


def test_experts_that_do_not_divide_are_refused() -> None:
    run_distributed(refused, 2)


def exchanged(rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rank r sends r rows to rank 0, and one row to every other rank."""
    send = [rank, 1, 1]
    receive = [0, 1, 2] if rank == 0 else [1, 1, 1]
    rows = (100.0 * rank + torch.arange(float(sum(send)))).unsqueeze(1).requires_grad_()
    received = exchange_rows(rows, send, receive, world(), "ep")
    torch.autograd.backward((received * (rank + 1)).sum())
    assert rows.grad is not None
    return received.detach().numpy()[:, 0].copy(), rows.grad.numpy()[:, 0].copy()


def test_exchange_moves_rows_there_and_gradients_back() -> None:
    received, gradients = zip(*run_distributed(exchanged, 3), strict=True)
    assert [row.tolist() for row in received] == [[100, 200, 201], [0, 101, 202], [1, 102, 203]]
    assert [grad.tolist() for grad in gradients] == [[2, 3], [1, 2, 3], [1, 1, 2, 3]]


def summed(rank: int) -> tuple[float, float, torch.dtype]:
    value = torch.tensor(2.0**-30 + rank, dtype=torch.float64)
    total = sum_over(value)
    return total.item(), value.item(), total.dtype


def test_sum_over_ranks_keeps_type_and_argument() -> None:
    for rank, (total, value, dtype) in enumerate(run_distributed(summed, 3)):
        assert (total, value) == (3 + 3 * 2.0**-30, 2.0**-30 + rank)
        assert dtype == torch.float64
