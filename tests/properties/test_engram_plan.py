"""Plans of Engram's rows against brute force: every id is found again, and limits by their definition."""

import pickle
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel.engram_plan import StepPlan, distinct, plan_step, subtree_limits, token_places


@st.composite
def requests(draw: st.DrawFn) -> tuple[NDArray[np.int64], int, int]:
    """Ids of some tokens, rows of the table, ranks."""
    num_rows, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    tokens, columns = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    rows = st.integers(0, num_rows - 1)
    flat = draw(st.lists(rows, min_size=tokens * columns, max_size=tokens * columns))
    return np.array(flat, np.int64).reshape(tokens, columns), num_rows, ranks


def plan(ids: NDArray[np.int64], num_rows: int, ranks: int) -> StepPlan:
    places, limits = np.arange(len(ids)), np.zeros(len(ids), np.int8)
    return plan_step(ids, places, limits, num_rows=num_rows, ranks=ranks)


@settings(max_examples=100, deadline=None)
@given(requests())
def test_a_plan_holds_each_row_once_with_its_owner(
    request: tuple[NDArray[np.int64], int, int],
) -> None:
    ids, num_rows, ranks = request
    made = plan(ids, num_rows, ranks)
    assert sorted(made.rows) == sorted(set(ids.reshape(-1).tolist()))
    assert np.array_equal(made.rows[made.inverse], ids)
    owners = np.repeat(np.arange(ranks), made.splits)
    assert np.array_equal(made.rows % ranks, owners)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**62), max_size=40), st.lists(st.integers(0, 39), max_size=80))
def test_distinct_ids_come_in_the_order_of_first_appearance(
    values: list[int], picks: list[int]
) -> None:
    ids = np.array([values[p % len(values)] for p in picks] if values else [], np.int64)
    unique, inverse = distinct(ids)
    assert unique.tolist() == list(dict.fromkeys(ids.tolist()))
    assert np.array_equal(unique[inverse], ids)


def test_ids_that_are_no_rows_are_named() -> None:
    ids = np.array([[0, 4], [3, 9], [-1, 2]])
    with pytest.raises(IndexError, match=r"row 9 \(token 1, column 1\) .* which have 9 rows"):
        plan(ids, 9, 2)
    with pytest.raises(IndexError, match=r"row -1 \(token 2, column 0\)"):
        plan(ids, 10, 2)


def test_a_plan_survives_its_way_from_a_worker() -> None:
    made = plan(np.array([[1, 4], [4, 3]]), 5, 2)
    again = pickle.loads(pickle.dumps(made))
    for name in ("rows", "inverse", "splits", "places", "limits"):
        mine, its = getattr(made, name), getattr(again, name)
        assert np.array_equal(mine, its), name
        assert mine.dtype == its.dtype, name


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Sequences, their length and the rank of each token: spans of it, or anything."""
    sequences, length = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    ranks, span = draw(st.integers(1, 3)), draw(st.integers(1, 2 * length))
    number = sequences * length
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=number, max_size=number))
    return sequences, length, [owners[i // span] for i in range(number)]


@settings(max_examples=150, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_limits_are_the_largest_subtrees_of_a_rank(
    batch: tuple[int, int, list[int]], random: Random
) -> None:
    sequences, length, owners = batch
    everything = [(s, p) for s in range(sequences) for p in range(length)]
    bits = max(length - 1, 0).bit_length()
    place = {token: token[0] * 2**bits + token[1] for token in everything}
    owner = {place[token]: owners[i] for i, token in enumerate(everything)}
    top = bits + (sequences - 1).bit_length()
    for rank in set(owners):
        mine = [token for i, token in enumerate(everything) if owners[i] == rank]
        random.shuffle(mine)
        indices, positions = np.array(mine).T
        places = token_places(indices, positions, length)
        assert places.tolist() == [place[token] for token in mine]
        limits = subtree_limits(places, num_sequences=sequences, sequence_length=length)
        for token, limit in zip(places.tolist(), limits.tolist(), strict=True):
            whole = [
                level
                for level in range(top + 1)
                if all(r == rank for p, r in owner.items() if p >> level == token >> level)
            ]
            assert limit == max(whole)


def test_limits_refuse_places_that_do_not_exist() -> None:
    for places in ([8], [4 + 3], [-1]):
        with pytest.raises(ValueError, match="the batch has 2 sequences of 3 tokens"):
            subtree_limits(np.array(places), num_sequences=2, sequence_length=3)
    with pytest.raises(ValueError, match="the same place"):
        subtree_limits(np.array([4, 0, 4]), num_sequences=2, sequence_length=3)
