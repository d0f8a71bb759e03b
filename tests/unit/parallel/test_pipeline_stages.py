import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline import SCHEDULES
from parallel.pipeline_stages import PipelineStages, microbatch_rule, num_stages, problems, takes
from parallel.torch_compat import init_fake_process_group


def pipeline(
    ranks: int, schedule: PipelineSchedule, per_rank: int, **keys: object
) -> ParallelConfig:
    return ParallelConfig(
        pipeline_parallel_size=ranks,
        pipeline_schedule=schedule,
        pipeline_stages_per_rank=per_rank,
        **keys,  # type: ignore[arg-type]
    )


def test_places_of_an_example_worked_by_hand() -> None:
    loop = PipelineStages.from_config(pipeline(3, "interleaved_1f1b", 2), 8)
    assert loop.layers == (
        range(2),
        range(2, 4),
        range(4, 5),
        range(5, 6),
        range(6, 7),
        range(7, 8),
    )
    assert [loop.of_rank(rank) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    v = PipelineStages.from_config(pipeline(3, "zbv", 2, pipeline_layers=(1, 2, 1, 1, 1, 2)), 8)
    assert v.layers[1] == range(1, 3)
    assert [v.of_rank(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            pipeline(2, "1f1b", 2),
            "parallel.pipeline_stages_per_rank=2: parallel.pipeline_schedule=1f1b has one on a rank; "
            "use 1, or parallel.pipeline_schedule=interleaved_1f1b",
        ),
        (
            pipeline(2, "dualpipev", 1, reshard_after_forward=False),
            "parallel.pipeline_stages_per_rank=1: parallel.pipeline_schedule=dualpipev has two on a "
            "rank; use 2, or parallel.pipeline_schedule=1f1b",
        ),
        (
            pipeline(2, "zbv", 2),
            "parallel.reshard_after_forward=true: parallel.pipeline_schedule=zbv needs the gathered "
            "parameters from the forward pass to the gradients of the weights; use "
            "parallel.reshard_after_forward=false, or parallel.pipeline_schedule=interleaved_1f1b",
        ),
        (
            pipeline(4, "looped_bfs", 2),
            "parallel.pipeline_parallel_size=4: times parallel.pipeline_stages_per_rank=2 makes 8 "
            "stages of model.num_layers=6, and each needs a layer; use 3 or fewer",
        ),
        (
            pipeline(2, "looped_bfs", 9),
            "parallel.pipeline_parallel_size=2: times parallel.pipeline_stages_per_rank=9 makes 18 "
            "stages of model.num_layers=6, and each needs a layer; use 1",
        ),
        (
            pipeline(4, "1f1b", 1, pipeline_layers=(3, 3)),
            "parallel.pipeline_layers=[3,3]: must be 4 numbers (parallel.pipeline_parallel_size=4 x "
            "parallel.pipeline_stages_per_rank=1), each at least 1, that add up to "
            "model.num_layers=6; use [2,2,1,1], or null",
        ),
        (
            pipeline(2, "1f1b", 1, pipeline_layers=(6, 0)),
            "parallel.pipeline_layers=[6,0]: must be 2 numbers (parallel.pipeline_parallel_size=2 x "
            "parallel.pipeline_stages_per_rank=1), each at least 1, that add up to "
            "model.num_layers=6; use [3,3], or null",
        ),
    ],
)
def test_a_problem_says_what_to_type(config: ParallelConfig, line: str) -> None:
    assert list(problems(config, 6)) == [line]


def test_all_problems_come_at_once() -> None:
    assert len(list(problems(pipeline(8, "zbv", 3), 6))) == 3


def test_rules_of_microbatches() -> None:
    interleaved = pipeline(4, "interleaved_1f1b", 2)
    assert [n for n in range(1, 14) if not takes(interleaved, n)] == [9, 11, 13]
    assert microbatch_rule(interleaved, 9) == (
        "parallel.pipeline_schedule=interleaved_1f1b orders them in 2 equal rounds of "
        "parallel.pipeline_parallel_size=4 or more"
    )
    assert microbatch_rule(pipeline(4, "dualpipev", 2), 7) == (
        "parallel.pipeline_schedule=dualpipev needs one for each of 8 stages"
    )


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    init_fake_process_group(0, request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4], indirect=True)
def test_torch_takes_the_microbatches_that_the_rules_take(world: int) -> None:
    """Neither more nor fewer, for each schedule: its constructor orders all ranks' passes."""
    for schedule, kind in SCHEDULES.items():
        per_rank = 1 if schedule == "1f1b" else 2
        config = pipeline(world, schedule, per_rank)
        plan = PipelineStages.from_config(config, num_stages(config))
        stages = [
            PipelineStage(nn.Identity(), stage, num_stages(config), torch.device("cpu"))
            for stage in plan.of_rank(0)
        ]
        for microbatches in range(1, 14):
            try:
                kind(stages if per_rank > 1 else stages[0], microbatches, loss_fn=nn.Identity())
            except ValueError:
                assert not takes(config, microbatches), (schedule, microbatches)
            else:
                assert takes(config, microbatches), (schedule, microbatches)


def test_the_arithmetic_imports_no_torch() -> None:
    code = "import sys, parallel.pipeline_stages, train.pipeline_rules; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
