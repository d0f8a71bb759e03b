"""The training step of every family of models: the device against the host, on one rank."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.gpu.runs import Trace, distance, recipe, relative, trace
from tests.gpu.worker import Worker
from train.config import RunConfig

pytestmark = pytest.mark.gpu

STAGES = (
    "[{steps:1,indexer_stage:dense},{steps:1,indexer_stage:dense_warmup},{indexer_stage:sparse}]"
)
FAMILIES = {
    "v4_nano": ("v4_nano",),
    "v4_nano, tables on the device": ("v4_nano", "parallel.engram.storage=device"),
    "v3_nano": ("v3_nano",),
    "v32_nano": ("v32_nano", f"train.stages={STAGES}"),
    "v4_flash_nano": ("v4_flash_nano", f"train.stages={STAGES}", "data.num_lanes=null"),
    "v41_flash_nano": ("v41_flash_nano",),
    "mhc_nano": ("mhc_nano",),
    "engram_nano": ("engram_nano",),
    "v4_nano_mm": ("v4_nano", "model=v4_nano_mm"),
}
"""Recipe and overrides, the most complete one first."""
LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "loss_indexer", "grad_norm")
FP64 = 1e-10
"""Rounding of fp64 after three steps; a sum in another type, or in TF32, is far above."""
MORE_THAN_THE_HOST, CHOSEN_BY_A_HAIR = 4.0, 5e-4
"""What the gradients of the device's fp32 may be off, over what the host's are: sums in another order;
and what one other expert or key makes, where two were equal up to rounding."""

Dtype = Literal["fp64", "fp32", "bf16"]


def of_family(family: str, corpus: Path, dtype: Dtype, *overrides: str) -> RunConfig:
    name, *own = FAMILIES[family]
    return recipe(name, corpus, *own, f"train.dtype={dtype}", *overrides)


@cache
def on_host(host: Worker, family: str, corpus: Path, dtype: Dtype) -> Trace:
    found: Trace = host.call(trace, of_family(family, corpus, dtype))
    return found


def on_both(
    device: Worker, host: Worker, family: str, corpus: Path, dtype: Dtype
) -> tuple[Trace, Trace]:
    """At the same time."""
    device.start(trace, of_family(family, corpus, dtype))
    try:
        wanted = on_host(host, family, corpus, dtype)
    except BaseException:
        device.close()  # nobody waits for its answer
        raise
    return device.result(), wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_in_fp64_are_the_hosts(
    device: Worker, host: Worker, tiny_corpus: Path, family: str, figure: Callable[[str], None]
) -> None:
    found, wanted = on_both(device, host, family, tiny_corpus, "fp64")
    gradients = [distance(*pair) for pair in zip(found.gradients, wanted.gradients, strict=True)]
    parameters = distance(found.parameters, wanted.parameters)
    worst = [f"{error:.1e} {name}" for error, name in (*gradients, parameters)]
    figure(f"{family} fp64: gradients and parameters {', '.join(worst)}")
    for ours, theirs in zip(found.records, wanted.records, strict=True):
        assert ours.keys() == theirs.keys()
        for name in LOSSES:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=FP64), name
    for error, name in (*gradients, parameters):
        assert error <= FP64, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_fp32_is_as_exact_as_the_hosts(
    device: Worker, host: Worker, tiny_corpus: Path, family: str, figure: Callable[[str], None]
) -> None:
    """Both are measured by the host's fp64. TF32 would show in the loss, which choices hardly move."""
    exact = on_host(host, family, tiny_corpus, "fp64")
    traces = on_both(device, host, family, tiny_corpus, "fp32")
    ours, theirs = (relative(made.gradients[0], exact.gradients[0]) for made in traces)
    loss, wanted = traces[0].records[0]["loss"], exact.records[0]["loss"]
    figure(f"{family} fp32: gradients {ours:.1e} (host {theirs:.1e}), loss {loss / wanted - 1:.1e}")
    assert ours <= max(MORE_THAN_THE_HOST * theirs, CHOSEN_BY_A_HAIR)
    assert loss == pytest.approx(wanted, rel=1e-6)


def determined(record: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says of the tables in host memory."""
    clocked = ("engram/fetch_seconds", "engram/prefetch_hidden_fraction")
    return {name: value for name, value in record.items() if name not in clocked}


@pytest.mark.parametrize("family", ["v3_nano", "v4_nano", "v41_flash_nano", "v4_nano_mm"])
def test_bf16_is_finite_close_and_the_same_every_time(
    device: Worker, host: Worker, tiny_corpus: Path, family: str, figure: Callable[[str], None]
) -> None:
    config = of_family(family, tiny_corpus, "bf16")
    assert config.train.deterministic
    one, other = (device.call(trace, config) for _ in range(2))
    assert [determined(row) for row in one.records] == [determined(row) for row in other.records]
    for name, value in one.parameters.items():
        assert np.isfinite(value).all(), name
        assert np.array_equal(value, other.parameters[name]), name
    exact = on_host(host, family, tiny_corpus, "fp64")
    error = max(
        abs(ours["loss"] / theirs["loss"] - 1)
        for ours, theirs in zip(one.records, exact.records, strict=True)
    )
    figure(f"{family} bf16: loss within {error:.1e} of fp64 over the steps")
    assert error <= 2e-2  # 8 bits of mantissa: 4e-3 for a rounding
