"""The runtime of pipelines alone, on stages of two matrices: every schedule against one chain."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline import Pipeline, Tensors
from parallel.pipeline_stages import PipelineStages
from tests.harness import run_distributed

WIDTH, ROWS, RANKS = 3, 4, 2
SCHEDULES: list[PipelineSchedule] = [
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv",
    "dualpipev",
]


class Stage(nn.Module):
    """Mixes two streams; the second one's gradient comes back transposed, hence not contiguous."""

    def __init__(self, index: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensors:
        return torch.tanh(x @ self.a) + y, (y.t() @ self.b.sin()).t()


def microbatch(number: int) -> Tensors:
    generator = torch.Generator().manual_seed(100 + number)
    x, y = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def losses_of(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x.square().sum(), (x * y).sum()])


def minimised(losses: Tensor) -> Tensor:
    return losses[0] + 0.5 * losses[1]


def pipeline_of(schedule: PipelineSchedule) -> tuple[Pipeline, list[Stage]]:
    config = ParallelConfig(
        pipeline_parallel_size=RANKS,
        pipeline_schedule=schedule,
        pipeline_stages_per_rank=1 if schedule == "1f1b" else 2,
    )
    count = RANKS * config.pipeline_stages_per_rank
    plan = PipelineStages.from_config(config, count)
    group = dist.group.WORLD
    assert group is not None
    own = [Stage(index) for index in plan.of_rank(group.rank())]
    runtime = Pipeline(plan, own, schedule, group=group, device=torch.device("cpu"))
    return runtime, own


def run(rank: int, schedule: PipelineSchedule, numbers: list[int]) -> dict[str, Any]:
    """Steps of so many microbatches each, gradients of the last; then losses without gradients."""
    runtime, own = pipeline_of(schedule)
    last, calls = len(runtime.stages.layers) - 1, Counter[int]()

    def compute(module: nn.Module, number: int, received: Tensors) -> Tensors | Tensor:
        assert isinstance(module, Stage)
        calls[number] += 1
        x, y = module(*(received or microbatch(number)))
        return (
            losses_of(x, y)
            if module is own[-1] and rank == runtime.stages.rank_of(last)
            else (x, y)
        )

    crossing = tuple(torch.empty_like(t, device="meta") for t in microbatch(0))
    seen: list[Tensor] = []

    def loss(losses: Tensor) -> Tensor:
        seen.append(losses.detach())
        return minimised(losses)

    for number in numbers:
        for stage in own:
            stage.zero_grad()
        seen.clear()
        calls.clear()
        runtime.forward_backward(compute, loss, crossing=crossing, num_microbatches=number)
        assert calls == dict.fromkeys(range(number), len(own))
    gradients = {
        (index, name): parameter.grad.numpy().copy()
        for index, stage in runtime.modules.items()
        for name, parameter in stage.named_parameters()
        if parameter.grad is not None
    }
    evaluated = runtime.forward(compute, [crossing] * 3)
    return {
        "gradients": gradients,
        "losses": [tensor.numpy() for tensor in seen],
        "evaluated": [tensor.numpy() for tensor in evaluated],
    }


def chain(stages: int, number: int) -> tuple[dict[Any, NDArray[Any]], list[NDArray[Any]]]:
    modules, losses = [Stage(index) for index in range(stages)], []
    for index in range(number):
        x, y = microbatch(index)
        for module in modules:
            x, y = module(x, y)
        losses.append(losses_of(x, y))
        minimised(losses[-1]).backward()  # type: ignore[no-untyped-call]
    gradients = {
        (index, name): parameter.grad.numpy()
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return gradients, [tensor.detach().numpy() for tensor in losses]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_computes_the_chain_and_each_microbatch_once(schedule: PipelineSchedule) -> None:
    stages, numbers = (2 if schedule == "1f1b" else 4), [4, 6, 4]
    wanted, losses = chain(stages, numbers[-1])
    found = run_distributed(run, RANKS, schedule, numbers)
    gradients = {key: value for rank in found for key, value in rank["gradients"].items()}
    assert gradients.keys() == wanted.keys()
    for key, value in wanted.items():
        assert gradients[key] == pytest.approx(value, rel=1e-12, abs=1e-14), key
    [of_last] = [rank for rank in found if rank["losses"]]
    for ours, theirs in zip(of_last["losses"], losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    for ours, theirs in zip(of_last["evaluated"], losses[:3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
