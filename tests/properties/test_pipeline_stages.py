"""Placement of layers and stages against counting: every layer is somewhere exactly once."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline_stages import (
    V_SHAPED,
    PipelineStages,
    even_layers,
    nearest_microbatches,
    num_stages,
    problems,
    takes,
)

SCHEDULES: tuple[PipelineSchedule, ...] = (
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv",
    "dualpipev",
)


Shape = tuple[PipelineSchedule, int, int]
SHAPES: st.SearchStrategy[Shape] = st.tuples(
    st.sampled_from(SCHEDULES), st.integers(2, 6), st.integers(1, 3)
)


def pipeline(shape: Shape) -> ParallelConfig:
    schedule, ranks, per_rank = shape
    return ParallelConfig(
        pipeline_parallel_size=ranks,
        pipeline_schedule=schedule,
        pipeline_stages_per_rank={"1f1b": 1, "zbv": 2, "dualpipev": 2}.get(schedule, per_rank),
        reshard_after_forward=False,
    )


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 9), st.data())
def test_every_layer_is_in_one_stage_and_every_stage_on_one_rank(
    shape: Shape, more: int, data: st.DataObject
) -> None:
    config = pipeline(shape)
    stages = num_stages(config)
    num_layers = stages + more
    if data.draw(st.booleans()):
        cuts = data.draw(st.permutations(range(1, num_layers)))[: stages - 1]
        ends = [0, *sorted(cuts), num_layers]
        given = tuple(end - start for start, end in pairwise(ends))
        config = replace(config, pipeline_layers=given)
    assert list(problems(config, num_layers)) == []
    plan = PipelineStages.from_config(config, num_layers)
    assert [layer for layers in plan.layers for layer in layers] == list(range(num_layers))
    assert tuple(map(len, plan.layers)) == (
        config.pipeline_layers or even_layers(num_layers, stages)
    )
    ranks = range(config.pipeline_parallel_size)
    placed = [stage for rank in ranks for stage in plan.of_rank(rank)]
    assert sorted(placed) == list(range(stages))
    for rank in ranks:
        own = plan.of_rank(rank)
        assert own == sorted(own)
        assert len(own) == config.pipeline_stages_per_rank
        assert all(plan.rank_of(stage) == rank for stage in own)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_stages_stand_where_torch_expects_them(shape: Shape) -> None:
    config = pipeline(shape)
    ranks = config.pipeline_parallel_size
    style = "v" if config.pipeline_schedule in V_SHAPED else "loop"
    wanted = generate_rank_to_stage_mapping(ranks, num_stages(config), style)
    plan = PipelineStages.from_config(config, num_stages(config))
    assert {rank: plan.of_rank(rank) for rank in range(ranks)} == wanted


@given(st.integers(1, 99), st.integers(1, 12))
def test_even_stages_differ_by_one_layer_at_most(num_layers: int, stages: int) -> None:
    counts = even_layers(num_layers, stages)
    assert sum(counts) == num_layers
    assert len(counts) == stages
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 40))
def test_suggested_numbers_of_microbatches_are_the_nearest_that_work(
    shape: Shape, microbatches: int
) -> None:
    config = pipeline(shape)
    works = [n for n in range(1, 100) if takes(config, n)]
    below = [n for n in works if n <= microbatches][-1:]
    above = [n for n in works if n >= microbatches][:1]
    assert nearest_microbatches(config, microbatches) == below + above


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_pipeline_there_is_one_stage(schedule: PipelineSchedule) -> None:
    config = ParallelConfig(pipeline_schedule=schedule, pipeline_stages_per_rank=2)
    plan = PipelineStages.from_config(config, 5)
    assert plan.layers == (range(5),)
    assert plan.of_rank(0) == [0]
