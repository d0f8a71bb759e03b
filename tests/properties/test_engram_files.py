"""Which rows two ranks of different layouts have in common, and where."""

from hypothesis import given
from hypothesis import strategies as st

from parallel.engram_files import TablePlace, common_rows, places

RANGES = st.builds(range, st.integers(0, 20), st.integers(0, 90), st.integers(1, 12))


@given(one=RANGES, other=RANGES)
def test_common_rows_are_those_of_both(one: range, other: range) -> None:
    found = common_rows(one, other)
    assert list(found) == sorted({*one} & {*other})
    for rows in (one, other):
        if found:
            assert list(rows)[places(found, rows)] == list(found)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ranks=st.integers(1, 7),
)
def test_rows_of_layers_are_where_the_flat_table_has_them(sizes: list[int], ranks: int) -> None:
    """Flat row g is local row g // ranks of rank g % ranks, layer after layer."""
    flat = [(layer, row) for layer, size in enumerate(sizes) for row in range(size)]
    for rank in range(ranks):
        local: list[tuple[int, int]] = []
        first_row = 0
        for layer, size in enumerate(sizes):
            table = TablePlace(layer, first_row, size)
            held = table.held(rank, ranks)
            assert [table.local(row, ranks) for row in held] == [
                len(local) + number for number in range(len(held))
            ]
            local += [(layer, row) for row in held]
            first_row += size
        assert local == flat[rank::ranks]
