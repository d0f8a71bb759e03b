"""Rotary positions, against positions written by hand and against their defining properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.positions import Span, rope_positions

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


def test_text_has_its_place_on_every_axis() -> None:
    assert rope_positions(4, []).tolist() == [[i, i, i] for i in range(4)]
    assert rope_positions(0, []).shape == (0, 3)


def test_a_picture_and_a_clip_by_hand() -> None:
    found = rope_positions(15, [Span(2, (1, 2, 3)), Span(9, (4, 1, 1))])
    assert found.tolist() == [
        *[[0, 0, 0], [1, 1, 1]],
        *[[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]],
        [5, 5, 5],  # behind the widest axis
        *[[6, 6, 6], [7, 6, 6], [8, 6, 6], [9, 6, 6]],
        *[[10, 10, 10], [11, 11, 11]],
    ]


@given(parts=st.lists(st.tuples(st.integers(0, 4), GRIDS), max_size=5), tail=st.integers(0, 4))
def test_positions_only_move_on(parts: list[tuple[int, tuple[int, int, int]]], tail: int) -> None:
    spans, length = [], 0
    for text, grid in parts:
        spans.append(Span(length + text, grid))
        length += text + int(np.prod(grid))
    found = rope_positions(length + tail, spans)
    inside = np.zeros(length + tail, bool)
    for span in spans:
        stop = span.start + int(np.prod(span.grid))
        inside[span.start : stop] = True
        here = found[span.start : stop]
        assert len({tuple(row) for row in here.tolist()}) == len(here)  # no two alike
        assert (here.max(0) - here.min(0) + 1).tolist() == list(span.grid)
        if span.start:
            assert here.min() > found[: span.start].max()
        if stop < len(found):
            assert found[stop:].min() == here.max() + 1
    text_rows = found[~inside]
    assert (text_rows == text_rows[:, :1]).all()


@pytest.mark.parametrize(
    ("spans", "rule"),
    [
        ([Span(0, (1, 2, 2)), Span(3, (1, 1, 1))], "must begin at 4 or later"),
        ([Span(2, (1, 2, 2))], "end by 5, but ends at 6"),
    ],
)
def test_spans_that_overlap_or_are_cut_are_refused(spans: list[Span], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        rope_positions(5, spans)
