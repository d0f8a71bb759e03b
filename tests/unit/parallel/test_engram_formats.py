from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parallel.config import EngramRowDtype
from parallel.engram_formats import (
    bf16_code,
    e4m3_code,
    gather_rows,
    rounding_of,
    store_row,
    stored_type,
)
from parallel.engram_optimizers import LazyAdam
from parallel.engram_rows import RowStore

Numbers = NDArray[np.float32]


def stored(
    values: Numbers,
    dtype: EngramRowDtype,
    *,
    step: int = 0,
    seed: int = 1,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[NDArray[Any], Numbers | None]:
    """Codes of `values` as the rows of one owner, and their scales."""
    rows = np.zeros(values.shape, stored_type(dtype, np.float32))
    scales = np.zeros(len(values), np.float32) if dtype == "fp8" else None
    rounding = rounding_of(seed=seed, step=step, rank=rank, ranks=ranks)
    for row in range(len(values)):
        store_row(rows, scales, row, values[row], rounding)
    return rows, scales


def through(values: Numbers, dtype: EngramRowDtype, **which: int) -> Numbers:
    """`values` stored and read again."""
    rows, scales = stored(values, dtype, **which)
    out = np.empty(values.shape, np.float32)
    gather_rows(rows, scales, np.arange(len(values)), out)
    return out


def bf16(codes: NDArray[Any]) -> Numbers:
    return torch.from_numpy(np.uint16(codes)).view(torch.bfloat16).float().numpy()


def e4m3(codes: NDArray[Any]) -> Numbers:
    return torch.from_numpy(np.uint8(codes)).view(torch.float8_e4m3fn).float().numpy()


def any_numbers(count: int) -> Numbers:
    """Random bits: all exponents, subnormal numbers, infinities and nan."""
    special = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0, 0x80000000, 1])
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint64)
    return np.concatenate([special, bits]).astype(np.uint32).view(np.float32)


def test_bf16_to_nearest_is_torchs() -> None:
    values = any_numbers(20_000)
    # Half of them are exactly between two numbers of bf16.
    values[::2].view(np.uint32)[:] = (values[::2].view(np.uint32) & 0xFFFF0000) | 0x8000
    keep = (values.view(np.uint32) >> 16) & 1
    codes = [bf16_code(v, np.uint32(0x7FFF + k)) for v, k in zip(values, keep, strict=True)]
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(bf16(np.array(codes)), wanted, equal_nan=True)


def test_e4m3_to_nearest_is_torchs() -> None:
    random = np.random.default_rng(0)
    values = (2.0 ** random.uniform(-13, 8.8, 20_000) * random.choice([-1, 1], 20_000)).astype(
        np.float32
    )
    steps = random.integers(0, 2**12, 20_000) / 2.0**10
    # Half of them are exactly between two numbers of e4m3 below 2^-6, on one, or a quarter off.
    values[::2] = (steps * 2.0**-9).astype(np.float32)[::2]
    values = values[np.abs(values) <= 448]
    nearest = torch.from_numpy(values).to(torch.float8_e4m3fn)
    small = np.abs(values) < 2.0**-6
    keep = np.where(small, np.floor(np.abs(values) * 512), values.view(np.uint32) >> 20)
    noise = 0x7FFFF + (keep.astype(np.uint32) & 1)
    codes = [e4m3_code(v, np.uint32(n)) for v, n in zip(values, noise, strict=True)]
    assert np.array_equal(np.array(codes), nearest.view(torch.uint8).numpy())


def test_e4m3_of_what_is_not_within_448() -> None:
    noise = np.uint32(0xFFFFF)
    assert e4m3(
        np.array([e4m3_code(np.float32(v), noise) for v in (448.1, -500, 448)])
    ).tolist() == [
        448,
        -448,
        448,
    ]
    specials = [e4m3_code(np.float32(v), noise) for v in (np.nan, np.inf, -np.inf)]
    assert np.isnan(e4m3(np.array(specials))).all()


@pytest.mark.parametrize("value", [1.0 + 2.0**-9, -3.1415, 1e-30, 2.9e38])
def test_bf16_goes_up_as_often_as_the_value_is_above(value: float) -> None:
    """Counted over all 2^16 noises: the mean is the value, exactly."""
    exact = np.float32(value)
    found = bf16(np.array([bf16_code(exact, np.uint32(noise)) for noise in range(0, 2**16, 16)]))
    low, high = np.unique(np.abs(found))
    ulp = float(high) - float(low)
    assert low < abs(exact) < high
    assert (
        abs(float(np.abs(found).astype(np.float64).mean()) - abs(float(exact))) < ulp * 16 / 2**16
    )


@pytest.mark.parametrize("value", [1.01, -300.0, 0.0173, 0.003, -0.0001])
def test_e4m3_goes_up_as_often_as_the_value_is_above(value: float) -> None:
    exact = np.float32(value)
    codes = np.array([e4m3_code(exact, np.uint32(n)) for n in range(0, 2**20, 2**8)])
    found = np.abs(e4m3(codes).astype(np.float64))
    low, high = np.unique(found)
    assert np.diff(np.unique(codes)).tolist() == [1]
    assert low < abs(exact) < high
    assert abs(found.mean() - abs(float(exact))) < (high - low) / 2**11


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_numbers_of_the_format_stay(dtype: EngramRowDtype) -> None:
    if dtype == "bf16":
        values = bf16(np.arange(2**16)).reshape(-1, 64)
    else:
        # A row needs its largest number for its scale to be 1.
        values = e4m3(np.arange(256)).reshape(-1, 16)
        values[:, 0] = 448
    for step in range(3):
        assert np.array_equal(through(values, dtype, step=step), values, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_random_rounding_has_the_right_mean_and_independent_errors(dtype: EngramRowDtype) -> None:
    values = np.full((3000, 64), 0.7371, np.float32)
    found = through(values, dtype).astype(np.float64)
    low, high = np.unique(found)
    chance = (0.7371 - low) / (high - low)
    up = (found == high) - chance
    sigma = np.sqrt(chance * (1 - chance))
    # Within five standard errors, over all, for each column and for the worst row.
    assert abs(up.mean()) < 5 * sigma / up.size**0.5
    assert np.abs(up.mean(0)).max() < 5 * sigma / 3000**0.5
    assert np.abs(up.mean(1)).max() < 5 * sigma / 64**0.5
    other = (through(values, dtype, step=1) == high) - chance
    seeded = (through(values, dtype, seed=2) == high) - chance
    neighbours = (up[:, 1:] * up[:, :-1], up[1:] * up[:-1], up * other, up * seeded)
    for product in neighbours:
        assert abs(product.mean()) < 5 * sigma**2 / product.size**0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_rounding_does_not_depend_on_the_owner(dtype: EngramRowDtype) -> None:
    values = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    whole, _ = stored(values, dtype)
    for ranks in (2, 3, 7):
        for rank in range(ranks):
            mine, _ = stored(values[rank::ranks], dtype, rank=rank, ranks=ranks)
            assert np.array_equal(mine, whole[rank::ranks])


def test_scale_is_the_smallest_power_of_two_that_holds_the_row() -> None:
    peaks = np.array([448, 448.1, 1.0, 1.75, 1.76, 3e38, 1e-20, 1e-37, 1e-44, 0], np.float32)
    _, scales = stored(np.stack([peaks, -peaks / 3], axis=1), "fp8")
    assert scales is not None
    for peak, scale in zip(peaks.astype(np.float64), scales.astype(np.float64), strict=True):
        assert np.log2(scale) % 1 == 0
        assert peak <= 448 * scale
        assert peak > 448 * scale / 2 or scale == 2.0**-126


def test_errors_of_fp8_are_within_a_step() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal((500, 32)) * 10.0 ** random.uniform(-30, 30, (500, 1))).astype(
        np.float32
    )
    peak = np.abs(values).max(1, keepdims=True)
    # 3 bits after the first, and below 2^-6 of the scaled numbers steps of 2^-9.
    step = np.maximum(np.abs(values) * 2.0**-3, peak * 2.0**-9 / 224)
    assert (np.abs(through(values, "fp8") - values) <= step).all()


def test_nan_stays_and_leaves_the_rest_of_the_row() -> None:
    values = np.array([[1.0, np.nan, -2.0, np.inf]], np.float32)
    for dtype in ("bf16", "fp8"):
        found = through(values, dtype)[0]
        assert found[0] == 1.0
        assert found[2] == -2.0
        assert np.isnan(found[1])
        assert not np.isfinite(found[3])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_small_updates_are_not_lost(dtype: EngramRowDtype) -> None:
    """2,000 updates of 1e-5 on 0.02; rounding to the nearest learns nothing."""
    # Without momentum Adam moves every weight by the learning rate.
    store = RowStore(
        512,
        16,
        LazyAdam(0.0, 0.0, 1e-30),
        rank=0,
        ranks=1,
        dtype=dtype,
        storage="memory",
        seed=3,
        huge_pages=False,
    )
    start = np.full((512, 16), 0.02, np.float32)
    start[:, 0] = 0.1  # what the scale of fp8 is for
    rows, scales = stored(start, dtype)
    store.arrays["rows"][:] = rows
    if scales is not None:
        store.arrays["scale"][:] = scales
    gradients = np.full((512, 16), -1.0, np.float32)
    gradients[:, 0] = 0
    for step in range(2000):
        store.update(np.arange(512), gradients, step=step, learning_rate=1e-5, scale=1.0)
    found = np.empty((512, 16), np.float32)
    store.gather(np.arange(512), found)
    assert abs(found[:, 1:].mean() - 0.04) < 0.0002
    nearest = torch.full((1,), 0.02).bfloat16()
    for _ in range(2000):
        nearest = (nearest.float() + 1e-5).bfloat16()
    assert float(nearest) < 0.0201
