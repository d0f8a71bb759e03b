import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.owners import Job, Part, Spread, balance


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_no_rank_has_much_more_than_the_mean(costs: list[int], num_ranks: int) -> None:
    owners = balance(costs, num_ranks)
    loads = [0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    assert sum(loads) == sum(costs)
    # When its last job came, the busiest rank had at most the mean of the others.
    assert num_ranks * max(loads) <= sum(costs) + (num_ranks - 1) * max(costs)


def test_equal_jobs_go_round() -> None:
    assert balance([5] * 6, 4) == [0, 1, 2, 3, 0, 1]


AXES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, 0, 1])), max_size=3)
"""Size of each axis and the dim that it cuts."""
SHAPE = st.tuples(st.integers(1, 12), st.integers(1, 7))
ROWS = st.tuples(st.integers(0, 12), st.integers(0, 12))


def spread_of(
    axes: list[tuple[int, int | None]], shape: tuple[int, int], rows: tuple[int, int]
) -> Spread:
    start, stop = sorted(min(row, shape[0]) for row in rows)
    sizes, cuts = tuple(size for size, _ in axes), tuple(dim for _, dim in axes)
    return Spread(range(start, stop), shape, sizes, cuts)


@given(AXES, SHAPE, ROWS)
def test_every_copy_holds_each_element_of_a_matrix_once(
    axes: list[tuple[int, int | None]], shape: tuple[int, int], rows: tuple[int, int]
) -> None:
    spread = spread_of(axes, shape, rows)
    ranks = range(math.prod(spread.mesh))
    held = np.zeros((spread.copies, *spread.matrix_shape), dtype=int)
    for rank in ranks:
        part = spread.part(rank)
        held[part.copy][part.place[1:]] += 1
        assert part.size == len(part.rows) * len(part.columns)
    assert (held == 1).all()


@given(AXES, SHAPE, ROWS)
def test_stacked_matrices_lie_one_after_the_other_on_every_rank(
    axes: list[tuple[int, int | None]], shape: tuple[int, int], rows: tuple[int, int]
) -> None:
    spread = spread_of(axes, shape, rows)
    height = spread.shape[0]
    ends = [0, spread.rows.start, spread.rows.stop, height]
    stacked = [
        Spread(range(start, stop), spread.shape, spread.mesh, spread.cuts)
        for start, stop in itertools.pairwise(ends)
    ]
    whole = Spread(range(height), spread.shape, spread.mesh, spread.cuts)
    for rank in range(math.prod(spread.mesh)):
        parts = [matrix.part(rank) for matrix in stacked]
        found = [
            (part.offset + k, start + row)
            for part, start in zip(parts, ends, strict=False)
            for k, row in enumerate(part.rows)
        ]
        assert found == list(enumerate(whole.part(rank).rows))


def test_a_strided_shard_worked_by_hand() -> None:
    """Tensor parallelism gives each 5 of 10 rows, which FSDP cuts into 3 and 2."""
    spread = Spread(range(10), (10, 2), (2, 2), (0, 0))
    rows = [spread.part(rank).rows for rank in range(4)]
    assert rows == [range(3), range(5, 8), range(3, 5), range(8, 10)]


def test_rows_and_columns_worked_by_hand() -> None:
    """Three copies of a matrix cut by rows over two ranks and by columns over two others."""
    spread = Spread(range(1, 5), (5, 6), (3, 2, 2), (None, 0, 1))
    assert spread.copies == 3
    assert spread.part(4 + 3) == Part(range(2, 4), range(3, 6), offset=0, copy=1)
    assert spread.part(8) == Part(range(2), range(3), offset=1, copy=2)


def test_an_owner_gets_the_parts_of_its_own_copy() -> None:
    """Ranks of other copies send nothing: these are the slow links."""
    spread = Spread(range(4), (4, 6), (3, 2), (None, 0))
    for owner in range(6):
        sources = [rank for rank in range(6) if Job(1, spread, owner).is_source(rank)]
        assert sources == [owner // 2 * 2, owner // 2 * 2 + 1]
        assert [Job(5, spread, owner).size(rank) for rank in range(6)] == [60] * 6


def test_a_rank_beyond_the_mesh_is_an_error() -> None:
    with pytest.raises(AssertionError, match="beyond"):
        Spread(range(4), (4, 4), (2,), (0,)).part(2)
