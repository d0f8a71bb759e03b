"""Rank arithmetic against counting: every rank is somewhere exactly once."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel.layout import DENSE_AXES, EXPERT_AXES, SEQUENCE_AXES, STAGE_AXES, ParallelLayout

SIZES = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    pipeline, replicate, data, context, tensor = (draw(SIZES) for _ in range(5))
    # Larger worlds are no other cases, only slower to count out.
    assume(pipeline * replicate * data * context * tensor <= 48)
    stage = replicate * data * context * tensor
    divisors = [size for size in range(1, stage + 1) if stage % size == 0]
    return ParallelLayout(
        pipeline=pipeline,
        data_replicate=replicate,
        data=data,
        context=context,
        tensor=tensor,
        expert=draw(st.sampled_from(divisors)),
        whole_experts=draw(st.booleans()),
    )


def nested_loops(layout: ParallelLayout, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Places in the order of ranks, by counting with the last axis fastest."""
    for place in itertools.product(*(range(layout.size(axis)) for axis in axes)):
        yield dict(zip(axes, place, strict=True))


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_coordinates_count_row_major_and_invert(layout: ParallelLayout) -> None:
    for axes in (DENSE_AXES, EXPERT_AXES):
        places = list(nested_loops(layout, axes))
        assert len(places) == layout.world_size
        for rank, place in enumerate(places):
            assert layout.coordinates(rank, axes) == place
            assert layout.rank(place, axes) == rank


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_every_rank_is_in_exactly_one_group_of_each_axis(layout: ParallelLayout) -> None:
    axes_of_groups = [*((axis,) for axis in {*DENSE_AXES, *EXPERT_AXES}), SEQUENCE_AXES, STAGE_AXES]
    for axes in axes_of_groups:
        groups = layout.groups(*axes)
        assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
        family = EXPERT_AXES if set(axes) & {"edp", "ep"} else DENSE_AXES
        places = [layout.coordinates(rank, family) for rank in range(layout.world_size)]
        for group in groups:
            assert group == sorted(group)
            fixed = [[places[rank][a] for a in family if a not in axes] for rank in group]
            assert all(other == fixed[0] for other in fixed)


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_expert_groups_lie_within_a_stage_and_are_consecutive(layout: ParallelLayout) -> None:
    for group in layout.groups("ep"):
        assert group == list(range(group[0], group[0] + layout.expert))
        assert len({layout.coordinates(rank)["pp"] for rank in group}) == 1
    product = layout.expert * layout.expert_data_parallel_size * layout.pipeline
    assert product == layout.world_size


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_copies_of_experts_are_equal_and_lie_within_those_of_all_parameters(
    layout: ParallelLayout,
) -> None:
    copies = layout.expert_replicate
    for group in layout.groups("edp"):
        assert len(group) % copies == 0
        size = len(group) // copies
        of_rank = [layout.coordinates(rank)["dp_replicate"] for rank in group]
        for first in range(0, len(group), size):
            assert copies == 1 or len(set(of_rank[first : first + size])) == 1
    if not layout.whole_experts:
        assert copies in (1, layout.data_replicate)
        # Copies are given up only where a copy of the ranks has no room for all experts.
        spanned = any(
            len({layout.coordinates(rank)["dp_replicate"] for rank in group}) > 1
            for group in layout.groups("ep")
        )
        assert (copies == layout.data_replicate) == (not spanned or layout.data_replicate == 1)


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_data_rank_is_shared_by_exactly_those_that_see_the_same_sequences(
    layout: ParallelLayout,
) -> None:
    same = [layout.data_rank(rank) for rank in range(layout.world_size)]
    assert set(same) == set(range(layout.data_parallel_size))
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for rank, other in itertools.combinations(range(layout.world_size), 2):
        place, its = places[rank], places[other]
        alike = all(place[axis] == its[axis] for axis in ("dp_replicate", "dp_shard"))
        assert (same[rank] == same[other]) == alike


@settings(max_examples=100, deadline=None)
@given(data=st.integers(1, 24), expert=st.integers(1, 24), num_experts=st.integers(1, 48))
def test_a_layout_without_problems_divides_and_every_fix_works(
    data: int, expert: int, num_experts: int
) -> None:
    problems = ParallelLayout(data=data, expert=expert).problems(num_experts)
    assert bool(problems) == (data % expert != 0 or num_experts % expert != 0)
    for problem in problems:
        _, _, fix = problem.rpartition("; use ")
        legal = {int(word) for word in fix.replace(" or", ",").split(",")}
        brute = {
            e for e in range(1, 49) if not ParallelLayout(data=data, expert=e).problems(num_experts)
        }
        assert legal == brute


@pytest.mark.parametrize(
    ("layout", "lines"),
    [
        (ParallelLayout(data=8, expert=4), 1),  # a dense model has nothing to divide
        (ParallelLayout(tensor=2, context=2, pipeline=2), 0),
        (ParallelLayout(data=0, pipeline=-1), 2),
        (ParallelLayout(data=8), 0),
    ],
)
def test_all_problems_come_at_once(layout: ParallelLayout, lines: int) -> None:
    problems = layout.problems(None)
    assert len(problems) == lines
    assert all(line.startswith("parallel.") and "; use " in line for line in problems)
