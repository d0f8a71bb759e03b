"""Sums of rows' gradients: the same bits however tokens are spread over ranks, and the right values."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel.engram_plan import subtree_limits, token_places
from parallel.engram_tree import order_partial_sums, order_sums, sum_of_squares, tree_sum
from tests.engram_store import tree_sum_at

LENGTH, SEQUENCES, COLUMNS, WIDTH, ROWS = 24, 8, 3, 5, 40


def occurrences(
    seed: int, dtype: type[np.floating]
) -> tuple[NDArray[np.int32], NDArray[np.floating]]:
    """Zipf rows of each token of the batch, another set in each column, and gradients over 4 decades."""
    random = np.random.default_rng(seed)
    shape = (SEQUENCES * LENGTH, COLUMNS)
    rows = np.minimum(random.zipf(1.3, shape), ROWS) - 1 + ROWS * np.arange(COLUMNS)
    sizes = 10 ** random.uniform(-4, 0, (*shape, 1))
    return rows.astype(np.int32), (random.standard_normal((*shape, WIDTH)) * sizes).astype(dtype)


def lanes(ranks: int) -> NDArray[np.int64]:
    """Rank of each token where ranks hold consecutive sequences."""
    return np.repeat(np.arange(SEQUENCES) * ranks // SEQUENCES, LENGTH)


def zigzag(ranks: int) -> NDArray[np.int64]:
    """Where ranks hold the i-th and i-th last of parts of each sequence."""
    parts = np.repeat(np.append(np.arange(ranks), np.arange(ranks)[::-1]), LENGTH // ranks // 2)
    return np.tile(parts, SEQUENCES)


def parts(ranks: int) -> NDArray[np.int64]:
    """Where ranks hold consecutive parts of each sequence."""
    return np.tile(np.repeat(np.arange(ranks), LENGTH // ranks), SEQUENCES)


def sums_over_ranks(
    rows: NDArray[np.int32],
    gradients: NDArray[np.floating],
    owners: NDArray[np.int64],
    random: np.random.Generator,
) -> tuple[NDArray[np.floating], int]:
    """Sums of all rows by way of the ranks' partial sums, and how many of these there are."""
    index = np.arange(len(owners))
    places = token_places(index // LENGTH, index % LENGTH, LENGTH)
    of_rows, of_places, sums = [], [], []
    for rank in random.permutation(owners.max() + 1):
        mine = random.permutation(np.flatnonzero(owners == rank))  # microbatches in any order
        limits = subtree_limits(places[mine], num_sequences=SEQUENCES, sequence_length=LENGTH)
        unique, inverse = np.unique(rows[mine], return_inverse=True)
        order, row = order_partial_sums(
            inverse.astype(np.int32).reshape(-1, COLUMNS), places[mine], limits, len(unique)
        )
        sums.append(tree_sum(gradients[mine].reshape(-1, WIDTH), order))
        of_rows.append(unique[row])
        of_places.append(order.first_places)
    unique, inverse = np.unique(np.concatenate(of_rows), return_inverse=True)
    order = order_sums(inverse.astype(np.int32), np.concatenate(of_places), len(unique))
    whole = np.zeros((ROWS * COLUMNS, WIDTH), gradients.dtype)
    whole[unique] = tree_sum(np.concatenate(sums), order)
    return whole, len(inverse)


def layouts(random: np.random.Generator) -> Sequence[tuple[str, NDArray[np.int64]]]:
    tokens = SEQUENCES * LENGTH
    return [
        *((f"lanes {r}", lanes(r)) for r in (1, 2, 3, 4, 8)),
        *((f"zigzag {r}", zigzag(r)) for r in (2, 3, 4)),
        *((f"parts {r}", parts(r)) for r in (2, 4, 6)),
        ("lanes and parts", lanes(2) * 3 + parts(3)),
        *((f"random {r}", random.integers(0, r, tokens)) for r in (2, 5)),
        ("a rank for each token", np.arange(tokens)),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_the_same_bits_in_every_layout(dtype: type[np.floating]) -> None:
    random = np.random.default_rng(1)
    rows, gradients = occurrences(0, dtype)
    one, number = sums_over_ranks(rows, gradients, lanes(1), random)
    assert number == len(np.unique(rows))  # one sum for each row leaves a rank that holds all
    for name, owners in layouts(random):
        sums, sent = sums_over_ranks(rows, gradients, owners, random)
        assert np.array_equal(sums, one), name
        assert number <= sent <= rows.size, name
    exact = np.zeros(one.shape)
    np.add.at(exact, rows.reshape(-1), gradients.reshape(-1, WIDTH).astype(np.float64))
    size = np.zeros(one.shape)
    np.add.at(size, rows.reshape(-1), np.abs(gradients.reshape(-1, WIDTH)).astype(np.float64))
    depth = np.log2(SEQUENCES) + np.ceil(np.log2(LENGTH))
    assert (np.abs(one - exact) <= depth * np.finfo(dtype).eps / 2 * size * 1.01).all()
    assert sum_of_squares(one) == pytest.approx(
        float((one.astype(np.float64) ** 2).sum()), rel=1e-14
    )


def test_plain_sums_differ_between_layouts() -> None:
    """Else the test above would show nothing."""
    rows, gradients = occurrences(0, np.float32)

    def plain(owners: NDArray[np.int64]) -> NDArray[np.floating]:
        total = np.zeros((ROWS * COLUMNS, WIDTH), np.float32)
        for rank in range(owners.max() + 1):
            mine = np.zeros_like(total)
            chosen = owners == rank
            np.add.at(mine, rows[chosen].reshape(-1), gradients[chosen].reshape(-1, WIDTH))
            total += mine
        return total

    assert not np.array_equal(plain(lanes(1)), plain(lanes(4)))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 2**20 - 1), st.floats(-1e3, 1e3, width=32), min_size=1),
    st.integers(0, 2**40),
)
def test_a_sum_is_that_of_the_recursive_tree(leaves: dict[int, float], block: int) -> None:
    """Also at places beyond 32 bits."""
    places = np.array(list(leaves), np.int64)
    values = np.array(list(leaves.values()), np.float32)[:, None]
    at = dict(zip(leaves, values, strict=True))
    order = order_sums(np.zeros(len(places), np.int32), places + (block << 20), 1)
    expected = tree_sum_at(at, 0, 20)
    assert np.array_equal(tree_sum(values, order)[0], expected)


def test_nothing_sums_to_nothing() -> None:
    none = np.zeros((0, COLUMNS), np.int32)
    order, row = order_partial_sums(none, np.zeros(0, np.int64), np.zeros(0, np.int8), 0)
    assert tree_sum(np.zeros((0, WIDTH), np.float32), order).shape == (0, WIDTH)
    assert len(row) == order.results == 0
