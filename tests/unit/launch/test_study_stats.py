"""Statistics of a study, against numerical integration and simulated studies."""

from math import gamma, pi, sqrt

import numpy as np
import pytest

from launch.study_config import Hypothesis
from launch.study_stats import (
    compare,
    detectable_effect,
    estimate,
    judge_bound,
    judge_comparison,
)


def lower(**fields: object) -> Hypothesis:
    return Hypothesis(name="h", statement="s", arm="a", **fields)  # type: ignore[arg-type]


def test_intervals_are_those_of_student() -> None:
    """Numerical integration of Student's density over the interval gives 95 %."""
    for number in (2, 3, 5, 11):
        values = np.random.default_rng(number).normal(size=number)
        found = estimate(values.tolist())
        assert found.half_width is not None
        assert found.mean == pytest.approx(values.mean())
        reach = found.half_width / (values.std(ddof=1) / sqrt(number))
        freedom = number - 1
        scale = gamma((freedom + 1) / 2) / (gamma(freedom / 2) * sqrt(freedom * pi))
        x = np.linspace(-reach, reach, 100_001)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-7)


def test_a_comparison_is_paired() -> None:
    found = compare([1.0, 2.0, 4.0], [0.5, 2.0, 3.0])
    gaps = np.array([0.5, 0.0, 1.0])
    assert found.difference.mean == pytest.approx(gaps.mean())
    assert found.effect_size == pytest.approx(gaps.mean() / gaps.std(ddof=1))
    # Exact for two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = gaps.mean() / (gaps.std(ddof=1) / sqrt(3))
    assert found.p_value == pytest.approx(1 - t / sqrt(2 + t**2))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_detectable_effect_is_decided_in_four_studies_of_five(seeds: int) -> None:
    """Simulated studies with that effect: the interval leaves out zero in 80 % of them."""
    studies = 200_000
    gaps = np.random.default_rng(seeds).normal(detectable_effect(seeds), 1, (studies, seeds))
    half_width = estimate([float(n) for n in range(seeds)]).half_width
    assert half_width is not None
    quantile = half_width / (np.std(range(seeds), ddof=1) / sqrt(seeds))
    error = gaps.std(axis=1, ddof=1) / sqrt(seeds)
    decided = np.abs(gaps.mean(axis=1)) > quantile * error
    assert decided.mean() == pytest.approx(0.8, abs=5 * sqrt(0.16 / studies))


def test_equal_arms_and_single_seeds_decide_nothing() -> None:
    claim = lower(against="b")
    for arm, other in (([1.0, 2.0], [1.0, 2.0]), ([1.0], [9.0])):
        found = compare(arm, other)
        assert found.p_value is found.effect_size is found.detectable is None
        assert judge_comparison(claim, found).outcome == "undecided"


def test_verdicts_claim_no_more_than_the_seeds_show() -> None:
    gaps = [-0.10, -0.11, -0.12]
    zeros = [0.0] * 3
    found = compare(gaps, zeros)
    assert judge_comparison(lower(against="b"), found).outcome == "supported"
    higher = lower(against="b", direction="higher")
    assert judge_comparison(higher, found).outcome == "not supported"
    assert judge_comparison(higher, compare(zeros, gaps)).outcome == "supported"
    noisy = compare([-0.01, -0.11, -0.21], zeros)
    assert judge_comparison(lower(against="b"), noisy).outcome == "undecided"


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([6.0, 70.0, 5.1], "supported"),
        ([6.0, 70.0, 5.0], "undecided"),
        ([1.0, 2.0, 5.0], "not supported"),
        ([6.0], "undecided"),
    ],
)
def test_a_bound_holds_if_every_seed_keeps_it(values: list[float], outcome: str) -> None:
    verdict = judge_bound(lower(metric="gain", reduce="max", above=5.0), values)
    assert verdict.outcome == outcome
    assert "max of gain" in verdict.finding


def test_a_bound_may_have_two_sides() -> None:
    claim = lower(metric="gain", above=0.999, below=1.001)
    assert judge_bound(claim, [1.0, 1.0005]).outcome == "supported"
    assert judge_bound(claim, [1.0, 1.002]).outcome == "undecided"
    assert judge_bound(claim, [0.9, 1.1]).outcome == "not supported"
