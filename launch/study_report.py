"""The report of a study: what each arm reached over its seeds, and whether they differ.

Called by `launch.study` when all runs are done. Arms are compared seed by seed: at one seed all
arms saw the same data in the same order, so the difference is less noisy than the losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from launch.compare import (
    LOSS_NOTE,
    Curve,
    Report,
    differences,
    format_loss,
    losses_over_tokens,
    read_recipe,
    read_records,
    smooth,
)
from launch.runs import Row, RunSummary, summarize

_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. With 2 seeds, a
difference of 2 standard errors comes up by chance in 30 % of the cases, not in 5 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Loss of an arm minus that of the first arm, paired by seed, in nats per token."""

    mean: float
    standard_error: float | None
    """None with one seed, which says nothing about chance."""
    num_seeds: int

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval around the mean."""
        if self.standard_error is None:
            return None
        quantile = _STUDENT_T[min(self.num_seeds - 1, len(_STUDENT_T)) - 1]
        return quantile * self.standard_error

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero; always more than 2 standard errors from it."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired_difference(losses: Sequence[float], base: Sequence[float]) -> Difference:
    """Compare two arms; both sequences are in the order of the same seeds."""
    gaps = [loss - other for loss, other in zip(losses, base, strict=True)]
    return Difference(
        mean=fmean(gaps),
        standard_error=stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else None,
        num_seeds=len(gaps),
    )


def verdict(arm: str, base: str, kind: str, difference: Difference) -> str:
    """The sentence about one arm; `kind` names the loss that is compared."""
    start = f"{arm} - {base}: {kind} loss {difference.mean:+.4f}"
    if difference.standard_error is None:
        return f"{start} at the only seed: undecided, one seed says nothing about chance."
    half_width = difference.half_width or 0.0
    low, high = difference.mean - half_width, difference.mean + half_width
    spread = (
        f"standard error {difference.standard_error:.4f} over {difference.num_seeds} paired seeds, "
        f"95 % interval {low:+.4f} to {high:+.4f}"
    )
    if not difference.decided:
        return f"{start} ({spread}): undecided; more seeds or more steps may tell."
    better = arm if difference.mean < 0 else base
    return f"{start} ({spread}): {better} is better."


def write_study_report(
    title: str, question: str, runs: Mapping[str, Sequence[Path]], output: Path
) -> tuple[Path, list[str]]:
    """Write report.md, loss.png and report.html of a study.

    Args:
        title: heading.
        question: what the study asks.
        runs: arm -> run directories in the order of the seeds, as many for every arm; the first
            arm is the one that the others are compared with.
        output: directory; made if missing.

    Returns:
        The HTML file, and the verdict on each arm but the first.

    Raises:
        ValueError: a run holds no records.
    """
    records = {arm: [read_records(path) for path in paths] for arm, paths in runs.items()}
    summaries = {
        arm: [
            summarize(path.name, path, rows) for path, rows in zip(paths, records[arm], strict=True)
        ]
        for arm, paths in runs.items()
    }
    base, *others = runs
    kind, losses = _compared_losses(summaries)
    verdicts = [
        verdict(arm, base, kind, paired_difference(losses[arm], losses[base])) for arm in others
    ]
    recipe = read_recipe(runs[base][0])
    rows = []
    for arm, paths in runs.items():
        changed = ", ".join(differences(recipe, read_recipe(paths[0])))
        rows.append([arm, changed, *_cells(summaries[arm])])
    report = Report(
        title=title,
        paragraphs=[question, *verdicts],
        header=["arm", f"differs from {base} in", "seeds", "steps", *_LOSS_HEADERS, "tokens/s"],
        rows=rows,
        curves=[arm_curve(arm, arm_records) for arm, arm_records in records.items()],
        notes=[
            "Mean and standard deviation over the seeds; in the picture, the mean and the range.",
            LOSS_NOTE,
            "Decided means: zero lies outside the 95 % confidence interval of the mean difference "
            "(Student's t over the paired seeds).",
        ],
    )
    return report.write(output), verdicts


_LOSS_HEADERS = ("training loss", "held-out loss")


def _compared_losses(
    summaries: Mapping[str, Sequence[RunSummary]],
) -> tuple[str, dict[str, list[float]]]:
    """The losses that decide, by arm: held-out ones if every run has one, else training ones."""
    held_out = {arm: _known(runs, "validation_loss") for arm, runs in summaries.items()}
    if all(len(held_out[arm]) == len(runs) for arm, runs in summaries.items()):
        return "held-out", held_out
    return "training", {arm: _known(runs, "final_loss") for arm, runs in summaries.items()}


def _known(runs: Sequence[RunSummary], name: str) -> list[float]:
    return [loss for run in runs if (loss := getattr(run, name)) is not None]


def _cells(runs: Sequence[RunSummary]) -> list[str]:
    speeds = _known(runs, "tokens_per_second")
    return [
        str(len(runs)),
        f"{runs[0].step:,}",
        _mean_and_deviation(_known(runs, "final_loss")),
        _mean_and_deviation(_known(runs, "validation_loss")),
        f"{fmean(speeds):,.0f}" if speeds else "-",
    ]


def _mean_and_deviation(losses: Sequence[float]) -> str:
    if not losses:
        return "-"
    mean = format_loss(fmean(losses))
    return f"{mean} +- {stdev(losses):.4f}" if len(losses) > 1 else mean


def arm_curve(arm: str, records: Sequence[list[Row]]) -> Curve:
    """Mean and range over the seeds of an arm, each smoothed; as far as all of them go."""
    points = [losses_over_tokens(rows) for rows in records]
    smoothed = [smooth(losses) for _, losses in points]
    columns = list(zip(*smoothed, strict=False))
    return Curve(
        label=arm,
        tokens=points[0][0][: len(columns)],
        loss=[fmean(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
    )
