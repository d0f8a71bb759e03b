"""What a few seeds say: intervals, paired tests, and the verdict on a hypothesis.

Called by `launch.study_report`. At one seed all arms saw the same data in the same order, so arms are
compared seed by seed: the difference is less noisy than the losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Literal

from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi, norm, t

from launch.study_config import Hypothesis

CONFIDENCE = 0.95
POWER = 0.8
Outcome = Literal["supported", "not supported", "undecided"]

RULES = (
    "A comparison is supported if the 95 % confidence interval of the mean difference (Student's t "
    "over the seeds, paired by seed) lies on the claimed side of zero, not supported if it lies on "
    "the other side, and undecided if it holds zero. A bound is supported if every seed keeps it, "
    "not supported if no seed does, and undecided otherwise. One seed decides nothing. Nothing is "
    "corrected for the number of hypotheses: of twenty true nulls, one is decided by chance.",
    f"p is that of the paired t test, d the mean difference over its standard deviation, and the "
    f"detectable difference is what would be decided in {POWER:.0%} of such studies if the seeds "
    "scatter as they did here: a smaller effect may be there and remain undecided.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Of the 95 % confidence interval; None with one seed, which says nothing about chance."""

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean where there is none."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean where there is none."""
        return self.mean + (self.half_width or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval by Student's t."""
    number = len(values)
    if number < 2:
        return Estimate(mean=fmean(values), half_width=None)
    half_width = _quantile(number - 1) * stdev(values) / sqrt(number)
    return Estimate(mean=fmean(values), half_width=half_width)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """An arm minus another, paired by seed."""

    difference: Estimate
    p_value: float | None
    """Two-sided, of the paired t test; None with one seed, or where all differences are equal."""
    effect_size: float | None
    """Mean over standard deviation of the differences (Cohen's d of pairs); None likewise."""
    detectable: float | None
    """Difference that is decided with a probability of 80 %; None likewise."""
    num_seeds: int


def compare(arm: Sequence[float], other: Sequence[float]) -> Comparison:
    """Compare two arms; both sequences are in the order of the same seeds."""
    gaps = [a - b for a, b in zip(arm, other, strict=True)]
    number = len(gaps)
    difference = estimate(gaps)
    deviation = stdev(gaps) if number > 1 else 0.0
    if not deviation:
        return Comparison(
            difference=difference,
            p_value=None,
            effect_size=None,
            detectable=None,
            num_seeds=number,
        )
    size = difference.mean / deviation
    return Comparison(
        difference=difference,
        p_value=2 * float(t.sf(abs(size) * sqrt(number), number - 1)),
        effect_size=size,
        detectable=detectable_effect(number) * deviation,
        num_seeds=number,
    )


@cache
def detectable_effect(num_seeds: int) -> float:
    """Effect size that a two-sided paired t test decides with a probability of 80 %.

    The mean is normal, the standard deviation over its true value chi over the root of the degrees of
    freedom, and both are independent.
    """
    freedom, quantile = num_seeds - 1, _quantile(num_seeds - 1)

    def excess(size: float) -> float:
        shift = size * sqrt(num_seeds)

        def decided(root: float) -> float:
            edge = quantile * root / sqrt(freedom)
            return float(
                (norm.cdf(shift - edge) + norm.cdf(-shift - edge)) * chi.pdf(root, freedom)
            )

        return float(quad(decided, 0.0, inf)[0]) - POWER

    return float(brentq(excess, 0.0, 100.0))


def _quantile(freedom: int) -> float:
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the runs say about a hypothesis."""

    outcome: Outcome
    finding: str
    """The numbers, as a sentence without its full stop."""


def judge_comparison(claim: Hypothesis, comparison: Comparison) -> Verdict:
    """By the first of `RULES`."""
    found, seeds = comparison.difference, comparison.num_seeds
    start = f"{claim.arm} - {claim.against}: {claim.label} {found.mean:+.4g}"
    if found.half_width is None:
        return Verdict(
            outcome="undecided",
            finding=f"{start} at the only seed, and one seed says nothing about chance",
        )
    finding = f"{start}, 95 % interval {found.low:+.4g} to {found.high:+.4g} over {seeds} seeds"
    if comparison.p_value is not None:
        finding += f", p = {comparison.p_value:.2g}"
    sign = 1 if claim.direction == "higher" else -1
    if found.low <= 0 <= found.high:
        return Verdict(outcome="undecided", finding=finding)
    return Verdict(
        outcome="supported" if sign * found.mean > 0 else "not supported", finding=finding
    )


def judge_bound(claim: Hypothesis, values: Sequence[float]) -> Verdict:
    """By the rule about bounds; `values` are those of the seeds."""
    low = float("-inf") if claim.above is None else claim.above
    high = float("inf") if claim.below is None else claim.below
    kept = sum(low < value < high for value in values)
    bounds = [f"above {claim.above:g}"] if claim.above is not None else []
    bounds += [f"below {claim.below:g}"] if claim.below is not None else []
    span = f"{min(values):.5g} to {max(values):.5g}" if len(values) > 1 else f"{values[0]:.5g}"
    finding = (
        f"{claim.arm}: {claim.label} is {span}, {' and '.join(bounds)} at {kept} of "
        f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    )
    if len(values) < 2 or 0 < kept < len(values):
        return Verdict(outcome="undecided", finding=finding)
    return Verdict(outcome="supported" if kept else "not supported", finding=finding)
