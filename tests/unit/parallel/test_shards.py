import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.shards import part_at


@given(st.integers(0, 50), st.integers(1, 9))
def test_one_axis_cuts_as_torch_does(size: int, ranks: int) -> None:
    parts = [part_at([rank], [3, size], [ranks], [1]) for rank in range(ranks)]
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(ranks)] if size else []
    assert [list(part[1]) for part in parts] == chunks + [[]] * (ranks - len(chunks))
    assert all(part[0] == range(3) for part in parts)


def test_the_innermost_axis_cuts_first() -> None:
    """Tensor parallelism gives each 5 of 10 rows, which FSDP cuts into 3 and 2."""
    parts = [part_at([dp, tp], [10], [2, 2], [0, 0]) for dp in (0, 1) for tp in (0, 1)]
    assert parts == [(range(3),), (range(5, 8),), (range(3, 5),), (range(8, 10),)]


def test_axes_of_copies_cut_nothing() -> None:
    assert part_at([1, 1, 1], [4, 6], [3, 2, 2], [None, 0, 1]) == (range(2, 4), range(3, 6))
