"""The residual maps of mHC are doubly stochastic, whatever the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.model.sinkhorn import project_doubly_stochastic


@settings(max_examples=60, deadline=None)
@given(
    streams=st.integers(2, 6),
    spread=st.floats(0.0, 200.0),
    seed=st.integers(0, 2**31),
    iterations=st.integers(1, 30),
)
def test_doubly_stochastic_to_the_stated_errors(
    streams: int, spread: float, seed: int, iterations: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(streams, streams, 50, generator=generator)
    matrix = project_doubly_stochastic(logits, iterations).double()
    assert ((matrix >= 0) & (matrix <= 1 + 1e-6)).all()
    assert float((matrix.sum(1) - 1).abs().max()) <= 1e-6
    # Each token has its own bound: the docstring of the function says where it comes from.
    ranges = (logits.amax(0) - logits.amin(0)).amax(0).double()
    bound = torch.expm1(ranges * torch.tanh(ranges / 2) ** (2 * iterations - 1))
    error = (matrix.sum(0) - 1).abs().amax(0)
    assert (error <= bound.clamp(max=streams - 1) + 2e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16),
    iterations=st.integers(1, 25),
)
def test_rows_sum_to_one_for_any_logits(entries: list[float], iterations: int) -> None:
    matrix = project_doubly_stochastic(torch.tensor(entries).view(4, 4, 1), iterations).double()
    assert float((matrix.sum(1) - 1).abs().max()) <= 1e-6
    assert float((matrix.sum(0) - 1).abs().max()) <= 3 + 1e-6


@pytest.mark.parametrize(("spread", "bound"), [(0.5, 1e-5), (1.0, 5e-3), (3.0, 0.1), (6.0, 0.2)])
def test_column_error_after_twenty_passes(spread: float, bound: float) -> None:
    logits = spread * torch.randn(4, 4, 4096, generator=torch.Generator().manual_seed(0))
    matrix = project_doubly_stochastic(logits, 20)
    assert float((matrix.sum(0) - 1).abs().max()) < bound


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.0, 15.0))
def test_equals_the_iteration_in_fp64_log_space(seed: int, spread: float) -> None:
    logits = spread * torch.randn(4, 4, 30, generator=torch.Generator().manual_seed(seed))
    wanted = logits.double()
    for _ in range(20):
        wanted = wanted - wanted.logsumexp(0, keepdim=True)
        wanted = wanted - wanted.logsumexp(1, keepdim=True)
    found = project_doubly_stochastic(logits, 20)
    torch.testing.assert_close(found.double(), wanted.exp(), rtol=0, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_column_shifts_change_nothing_and_products_stay_doubly_stochastic(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 4, 20, generator=generator)
    shift = 5 * torch.randn(1, 4, 20, generator=generator)
    matrix = project_doubly_stochastic(logits, 20)
    torch.testing.assert_close(
        project_doubly_stochastic(logits + shift, 20), matrix, rtol=1e-4, atol=1e-5
    )
    product = torch.einsum("ijt,jkt->ikt", matrix, matrix)
    torch.testing.assert_close(product.sum(1), torch.ones(4, 20), rtol=0, atol=1e-5)
