"""The order of documents: permutation and mixture."""

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import credit_after, draw_source, permute, round_keys

weight_lists = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    keys = round_keys(seed, "train/code", epoch)
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


def test_every_small_size_is_a_bijection() -> None:
    keys = round_keys(1, "train/code", 0)
    for size in range(1, 130):
        assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2**64), seed=st.integers(0, 2**32), data=st.data())
def test_large_ranges_stay_inside_and_do_not_collide(
    size: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    images = {permute(i, size, round_keys(seed, "s", 0)) for i in positions}
    assert len(images) == len(positions)
    assert all(0 <= image < size for image in images)


def test_permutations_look_random() -> None:
    """Chi-square of image against position over many keys; 4.5 sigma, and the keys are fixed."""
    size, keys = 23, 920
    counts = np.zeros((size, size))
    for epoch in range(keys):
        table = round_keys(7, "train/code", epoch)
        for position in range(size):
            counts[position, permute(position, size, table)] += 1
    expected = keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_order_is_the_same_in_every_version() -> None:
    """Changing these numbers would silently reorder every run that is resumed."""
    keys = round_keys(0, "train/code", 0)
    assert [permute(i, 10, keys) for i in range(10)] == [2, 0, 5, 8, 4, 6, 1, 9, 3, 7]
    credit = [0, 0, 0]
    # By hand, first..last slot of each draw: 0: 0-1 1-3 3-5 5-7 7-8, 1: 0-2 3-5 6-8, 2: 0-8.
    assert [draw_source((5, 3, 1), credit) for _ in range(9)] == [0, 1, 0, 0, 1, 0, 1, 0, 2]


@given(weights=weight_lists, draws=st.integers(1, 300))
def test_mixture_is_exact_within_one(weights: list[int], draws: int) -> None:
    credit, chosen = [0] * len(weights), Counter[int]()
    for drawn in range(1, draws + 1):
        chosen[draw_source(weights, credit)] += 1
        assert sum(credit) == 0
        for source, weight in enumerate(weights):
            assert abs(chosen[source] - Fraction(drawn * weight, sum(weights))) < 1


@given(weights=weight_lists, draws=st.integers(0, 500))
def test_mixture_repeats_after_the_sum_of_weights(weights: list[int], draws: int) -> None:
    credit = [0] * len(weights)
    for _ in range(draws):
        draw_source(weights, credit)
    assert credit == credit_after(weights, draws)
