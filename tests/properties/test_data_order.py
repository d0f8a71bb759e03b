"""The order of documents: permutation and mixture."""

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.order import (
    credit_after,
    draw_source,
    permute,
    permute_blocks,
    round_keys,
    skip_held_out,
    unpermute,
)

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


@settings(deadline=None)
@given(size=st.integers(1, 2**64), seed=st.integers(0, 2**32), data=st.data())
def test_large_ranges_stay_inside_and_do_not_collide(
    size: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    images = {permute(i, size, round_keys(seed, "s", 0)) for i in positions}
    assert len(images) == len(positions)
    assert all(0 <= image < size for image in images)


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 600),
    block=st.integers(1, 70),
    window=st.integers(1, 9),
    epoch=st.integers(0, 2**40),
)
def test_blocks_are_permuted_and_shuffled_in_windows(
    size: int, block: int, window: int, epoch: int
) -> None:
    """Against the definition: lists of blocks, joined by windows."""
    name: dict[str, Any] = {"seed": 5, "stream": "train/code", "epoch": epoch}
    images = [permute_blocks(i, size, **name, block=block, window=window) for i in range(size)]
    assert sorted(images) == list(range(size))
    keys = round_keys(5, "train/code", epoch)
    if block == 1:
        assert images == [permute(i, size, keys) for i in range(size)]
        return
    blocks = [range(start, min(size, start + block)) for start in range(0, size, block)]
    order = [blocks[permute(slot, len(blocks), keys)] for slot in range(len(blocks))]
    start = 0
    for first in range(0, len(order), window):
        inside = [document for one in order[first : first + window] for document in one]
        assert sorted(images[start : start + len(inside)]) == sorted(inside)
        start += len(inside)


def all_images(size: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    """`permute` of all positions at once, in numpy."""
    half = np.uint64(max(2, (size - 1).bit_length()) // 2)
    low_mask = (np.uint64(1) << half) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(max(2, (size - 1).bit_length())) - half) - np.uint64(1)

    def mix(value: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
        value = value + np.uint64(key)
        value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return value ^ value >> np.uint64(31)

    images = np.arange(size, dtype=np.uint64)
    walking = np.ones(size, bool)
    while walking.any():
        high, low = images[walking] >> half, images[walking] & low_mask
        for left, right in zip(keys[::2], keys[1::2], strict=True):
            high ^= mix(low, left) & high_mask
            low ^= mix(high, right) & low_mask
        images[walking] = high << half | low
        walking &= images >= size
    return images


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_size_to_ten_thousand_is_a_bijection() -> None:
    keys = round_keys(3, "train/code", 0)
    for size in range(1, 10_001):
        images = all_images(size, keys)
        assert np.array_equal(np.sort(images), np.arange(size)), size
        for position in {0, size // 3, size - 1}:
            assert permute(position, size, keys) == images[position]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 300), data=st.data())
def test_held_out_elements_are_left_out_and_the_others_nearly_stay(
    size: int, data: st.DataObject
) -> None:
    held = data.draw(st.integers(0, size - 1))
    keys = round_keys(0, "held out", 0)
    out = {permute(i, size, keys) for i in range(held)}
    assert [unpermute(permute(i, size, keys), size, keys) for i in range(size)] == [*range(size)]
    kept = [skip_held_out(i, size, held, keys) for i in range(size - held)]
    assert sorted(kept) == sorted(set(range(size)) - out)
    assert all(element == i for i, element in enumerate(kept) if i not in out)


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


@settings(deadline=None)
@given(weights=weight_lists, draws=st.integers(1, 300))
def test_mixture_is_exact_within_one(weights: list[int], draws: int) -> None:
    credit, chosen = [0] * len(weights), Counter[int]()
    for drawn in range(1, draws + 1):
        chosen[draw_source(weights, credit)] += 1
        assert sum(credit) == 0
        for source, weight in enumerate(weights):
            assert abs(chosen[source] - Fraction(drawn * weight, sum(weights))) < 1


@settings(deadline=None)
@given(weights=weight_lists, draws=st.integers(0, 500))
def test_mixture_repeats_after_the_sum_of_weights(weights: list[int], draws: int) -> None:
    credit = [0] * len(weights)
    for _ in range(draws):
        draw_source(weights, credit)
    assert credit == credit_after(weights, draws)
