"""`parallel.deepep` on a stand-in for DeepEP: the reference's results where bf16 rounds nothing."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.expert import AllToAllDispatcher, Dispatcher
from tests.distributed import deepep_stand_in
from tests.harness import run_distributed

EXPERTS, HIDDEN, K = 8, 16, 3


def dispatcher(kind: str) -> Dispatcher:
    group = dist.group.WORLD
    assert group is not None
    if kind == "all_to_all":
        return AllToAllDispatcher(group, EXPERTS)
    sys.modules["deep_ep"] = deepep_stand_in.module()
    from parallel.deepep import DeepEPDispatcher  # noqa: PLC0415 - needs DeepEP

    made: Dispatcher = DeepEPDispatcher(group, EXPERTS)
    return made


class Scale(nn.Module):
    """Multiplies each expert's rows by its factor."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        return rows * self.factors.repeat_interleave(counts).unsqueeze(1)


def passed(rank: int, kind: str, exact: bool, skewed: bool) -> list[NDArray[Any]]:
    """Output and gradients of tokens, weights and experts; the last rank has no tokens."""
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == size - 1 else 20 + rank
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    scores[:, : EXPERTS // 2] += float(skewed)  # then the other half of the ranks gets no rows
    values = torch.randn(tokens, HIDDEN, generator=generator)
    weights = torch.rand(tokens, K, generator=generator)
    factors = torch.rand(EXPERTS, generator=generator)
    if exact:  # few bits, so that no product and no sum is rounded
        values, weights = values.round(), 2 ** (weights * 3).floor() / 4
        factors = 2 ** torch.arange(EXPERTS).remainder(3).float()
    factors = factors.chunk(size)[rank].bfloat16()
    experts = Scale(factors)
    leaves = [values.bfloat16().requires_grad_(), weights.requires_grad_(), experts.factors]
    out = dispatcher(kind)(leaves[0], scores.topk(K).indices, leaves[1], experts)()
    assert out.dtype == torch.bfloat16
    direction = torch.arange(HIDDEN).remainder(3).bfloat16() - 1
    grads = torch.autograd.grad((out * direction).float().sum(), leaves)
    return [value.detach().float().numpy().copy() for value in (out, *grads)]


@pytest.mark.parametrize(("ranks", "skewed"), [(2, False), (4, False), (4, True)])
def test_equals_the_reference(ranks: int, skewed: bool) -> None:
    references = run_distributed(passed, ranks, "all_to_all", True, skewed)
    for found, wanted in zip(
        run_distributed(passed, ranks, "deepep", True, skewed), references, strict=True
    ):
        for value, reference in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(value, reference)
    assert all(np.abs(reference[3]).sum() > 0 for reference in references[: 1 + ranks // 4])


def test_differs_from_the_reference_by_the_rounding_of_partial_sums() -> None:
    for found, wanted in zip(
        *(run_distributed(passed, 2, kind, False, False) for kind in ("deepep", "all_to_all")),
        strict=True,
    ):
        for value, reference in zip(found, wanted, strict=True):
            assert np.linalg.norm(value - reference) <= 2**-7 * np.linalg.norm(reference)


def calls(rank: int) -> list[str]:
    """Of two layers, and what is computed meanwhile."""
    log = deepep_stand_in.LOG
    values = torch.ones(4, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    stream: Tensor = values
    for _ in range(2):
        collect = dispatcher("deepep")(
            stream, torch.tensor([[0, 5, 7]] * 4), torch.ones(4, K), Scale(torch.ones(4).bfloat16())
        )
        meanwhile = stream * 2
        log.append("meanwhile")
        meanwhile.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: log.append("gradient meanwhile")
        )
        stream = collect() + meanwhile
    torch.autograd.backward(stream.float().sum())
    return log


def test_tokens_and_gradients_travel_meanwhile() -> None:
    """One buffer serves all layers."""
    forward = ["dispatch", "meanwhile", "wait", "combine"]
    backward = ["dispatch again", "combine", "gradient meanwhile", "wait"]
    wanted = ["Buffer", *forward, *forward, *backward, *backward]
    assert run_distributed(calls, 2) == [wanted, wanted]


def refused(rank: int) -> None:
    if dist.get_world_size() == 3:
        with pytest.raises(
            ValueError, match=r"expert_parallel_size=3: must divide .*num_experts=8"
        ):
            dispatcher("deepep")
        return
    with pytest.raises(
        ValueError, match="expert_parallel_size=1: DeepEP says: Unsupported number of EP ranks: 1"
    ):
        dispatcher("deepep")


def test_a_number_of_ranks_that_it_does_not_have_is_refused() -> None:
    run_distributed(refused, 1)
    run_distributed(refused, 3)


def refused_type(rank: int) -> None:
    tokens, weights = torch.zeros(1, HIDDEN), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"deepep: sends bf16, not torch.float32; use train.dtype"):
        dispatcher("deepep")(tokens, torch.zeros(1, 1, dtype=torch.int64), weights, Scale(weights))


def test_other_types_are_refused() -> None:
    run_distributed(refused_type, 2)
