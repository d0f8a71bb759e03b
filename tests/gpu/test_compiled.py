"""The compiled passes over mHC's streams on the device, against those that are not compiled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.runs import relative, trace
from tests.gpu.test_training import of_family
from tests.gpu.worker import Worker

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(180)
@pytest.mark.parametrize("family", ["v4_nano", "v41_flash_nano"])
def test_compiled_passes_over_the_streams(
    device: Worker, tiny_corpus: Path, family: str, figure: Callable[[str], None]
) -> None:
    """Against the passes that are not compiled, by what fp32 is off from fp64."""
    config = of_family(family, tiny_corpus, "fp32", "train.recompute=streams")
    hyper = replace(config.model.hyper_connection, compile=True)
    compiled = replace(config, model=replace(config.model, hyper_connection=hyper))
    wanted = device.call(trace, config)
    one, other = (device.call(trace, compiled, timeout=170.0) for _ in range(2))
    error = relative(one.gradients[0], wanted.gradients[0])
    figure(f"{family} compiled: gradients {error:.1e}")
    assert one.records[0]["loss"] == pytest.approx(wanted.records[0]["loss"], rel=1e-5)
    assert error <= 1e-4
    for name, value in one.parameters.items():
        assert np.array_equal(value, other.parameters[name]), name
