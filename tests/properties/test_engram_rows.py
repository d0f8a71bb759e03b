"""Rows on their owners: any updates, owners and formats, against whole tables in plain torch."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel.engram_formats import bf16_code, e4m3_code
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer
from parallel.engram_rows import RowStore
from tests import plain_row_optimizers

OPTIMIZERS: list[RowOptimizer] = [LazyAdam(0.8, 0.9, 1e-6), RowAdagrad(1e-6)]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(0, 2**32 - 1),
    noise=st.integers(0, 2**16 - 1),
)
def test_bf16_goes_to_one_of_the_two_neighbours(bits: int, noise: int) -> None:
    value = np.uint32(bits).view(np.float32)
    code = int(bf16_code(value, np.uint32(noise)))
    if np.isfinite(value):
        assert code == (bits >> 16) + ((bits & 0xFFFF) + noise >= 2**16)
    else:
        read = torch.tensor([code], dtype=torch.uint16).view(torch.bfloat16).float().numpy()[0]
        assert np.array_equal(read, value, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(
    value=st.floats(-448, 448, width=32),
    noise=st.tuples(st.integers(0, 2**20 - 1), st.integers(0, 2**20 - 1)),
)
def test_e4m3_goes_to_one_of_the_two_neighbours(value: float, noise: tuple[int, int]) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    low, high = sorted(noise)
    codes = [int(e4m3_code(np.float32(value), np.uint32(n))) for n in (low, high)]
    first, second = (abs(float(numbers[code])) for code in codes)
    # More noise never rounds towards zero, and no number of the format lies between value and code.
    assert first <= second
    for found in (first, second):
        near, far = sorted((found, abs(value)))
        assert not ((numbers > near) & (numbers < far)).any()
    assert all((code >= 128) == (np.signbit(value)) for code in codes)


@st.composite
def updates(draw: st.DrawFn, rows: int) -> list[NDArray[np.int64]]:
    """Which rows each step touches; none is possible."""
    touched = st.sets(st.integers(0, rows - 1), max_size=rows)
    return [np.array(sorted(draw(touched)), np.int64) for _ in range(draw(st.integers(1, 6)))]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 30), width=st.integers(1, 20), ranks=st.integers(1, 5))
def test_owners_together_are_one_table(
    data: st.DataObject, rows: int, width: int, ranks: int
) -> None:
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    stores = [new_store(optimizer, rows, width, rank, ranks) for rank in range(ranks)]
    whole = new_store(optimizer, rows, width, 0, 1)
    plain = {name: torch.from_numpy(array.copy()) for name, array in whole.arrays.items()}
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    for step, touched in enumerate(data.draw(updates(rows))):
        gradients = random.standard_normal((len(touched), width)).astype(np.float32)
        settings_of_step: dict[str, Any] = {"learning_rate": 0.1 / (step + 1), "scale": 0.5}
        for rank, store in enumerate(stores):
            mine = touched % ranks == rank
            local = touched[mine] // ranks
            store.update(local, gradients[mine], step=step, **settings_of_step)
        plain_row_optimizers.update(
            optimizer,
            plain,
            torch.from_numpy(touched),
            torch.from_numpy(gradients),
            **settings_of_step,
        )
    for name, tensor in plain.items():
        for rank, store in enumerate(stores):
            assert np.array_equal(store.arrays[name], tensor.numpy()[rank::ranks]), name


def new_store(optimizer: RowOptimizer, rows: int, width: int, rank: int, ranks: int) -> RowStore:
    return RowStore(
        rows,
        width,
        optimizer,
        rank=rank,
        ranks=ranks,
        dtype="fp32",
        storage="memory",
        seed=0,
        huge_pages=False,
    )
