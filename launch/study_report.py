"""The report of a study: verdicts, what was expected, what was seen, what it cost, was it fair.

Called by `launch.study` when all runs are done. Everything is read from the run directories, so it can
be made again at any time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from launch.compare import Curve, differences, losses_over_tokens, read_records, smooth
from launch.runs import Row
from launch.study_checks import Check, check_runs
from launch.study_config import HELD_OUT_LOSS, Hypothesis, Reduction, StudyConfig
from launch.study_cost import cpu_seconds
from launch.study_page import Block, Bullets, Picture, Section, Table, write_page
from launch.study_plan import Trial
from launch.study_size import deviation, size_of
from launch.study_stats import (
    RULES,
    Verdict,
    compare,
    estimate,
    judge_bound,
    judge_comparison,
)
from train.recipe import to_plain

_REDUCE: dict[Reduction, Callable[[list[float]], float]] = {
    "last": lambda values: values[-1],
    "max": max,
    "min": min,
}
_CURVE_NOTE = (
    "Lines are means over the seeds, bands the range from the lowest to the highest seed. Training "
    "losses are next-token cross-entropy in nats per token, smoothed by an exponential moving average "
    "over about 1/50 of the run; nothing else is smoothed."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRuns:
    """A study whose runs are done."""

    config: StudyConfig
    trials: dict[str, list[Trial]]
    """Arm -> its trials, in the order of the seeds."""
    records: dict[str, list[list[Row]]]
    """Likewise."""

    @classmethod
    def read(cls, config: StudyConfig, trials: Sequence[Trial]) -> "StudyRuns":
        """Read the records.

        Raises:
            ValueError: a run holds none.
        """
        by_arm = {arm: [t for t in trials if t.arm == arm] for arm in config.arm_names}
        return cls(
            config=config,
            trials=by_arm,
            records={
                arm: [read_records(trial.run_dir) for trial in of_arm]
                for arm, of_arm in by_arm.items()
            },
        )

    @property
    def reference(self) -> str:
        """The first arm."""
        return self.config.arm_names[0]

    def values(self, arm: str, metric: str, reduce: Reduction) -> list[float]:
        """What of a metric stands for each run of an arm.

        Raises:
            ValueError: a run has no record of it.
        """
        found = []
        for trial, rows in zip(self.trials[arm], self.records[arm], strict=True):
            values = [float(row[metric]) for row in rows if metric in row]
            if not values:
                raise ValueError(
                    f"metric {metric}: {trial.run_dir} has no record of it; name one of "
                    f"{', '.join(sorted(set().union(*rows)))}"
                )
            found.append(_REDUCE[reduce](values))
        return found

    def has(self, arm: str, metric: str) -> bool:
        """Whether every run of an arm recorded a metric."""
        return all(any(metric in row for row in rows) for rows in self.records[arm])


def write_study_report(runs: StudyRuns, output: Path) -> tuple[Path, list[str], bool]:
    """Write report.md, its pictures and report.html of a study.

    Returns:
        The HTML file, a sentence for each hypothesis, and whether every check has passed.

    Raises:
        ValueError: a hypothesis names a metric that its arms do not record.
    """
    config = runs.config
    checks = check_runs(runs.records)
    fair = not any(check.problem for check in checks)
    answers = [_sentence(claim, _judge(runs, claim), fair) for claim in config.hypotheses]
    sections = [
        Section(title="Question", blocks=[config.question]),
        Section(title="Answers", blocks=[Bullets(items=answers)]),
        Section(title="What the papers lead one to expect", blocks=[config.expectation]),
        Section(title="What this scale can show", blocks=[config.scale_note]),
        Section(title="Results", blocks=_results(runs)),
        Section(title="Curves", blocks=[*_pictures(runs), _CURVE_NOTE]),
        Section(title="Arms: sizes and what they cost", blocks=_arms(runs)),
        Section(title="Was it fair", blocks=[_checks(checks)]),
        Section(title="How it was decided", blocks=[Bullets(items=list(RULES))]),
    ]
    return write_page(f"Study {config.name}", sections, output), answers, fair


def _judge(runs: StudyRuns, claim: Hypothesis) -> Verdict:
    values = runs.values(claim.arm, claim.metric, claim.reduce)
    if claim.against is None:
        return judge_bound(claim, values)
    other = runs.values(claim.against, claim.metric, claim.reduce)
    return judge_comparison(claim, compare(values, other))


def _sentence(claim: Hypothesis, verdict: Verdict, fair: bool) -> str:
    outcome = f"{verdict.outcome} at this budget" if fair else "void, for a check has failed"
    return f"{claim.name}: {claim.statement}: {outcome} ({verdict.finding})."


def _results(runs: StudyRuns) -> list[Block]:
    """What every arm reached, and every comparison."""
    config = runs.config
    metrics: dict[str, tuple[str, Reduction]] = {HELD_OUT_LOSS: (HELD_OUT_LOSS, "last")}
    metrics |= {claim.label: (claim.metric, claim.reduce) for claim in config.hypotheses}
    reached = Table(
        header=["arm", "seeds", "training loss at step 1", *metrics],
        rows=[
            [
                arm,
                str(len(runs.trials[arm])),
                _mean([losses_over_tokens(rows)[1][0] for rows in runs.records[arm]]),
                *(_cell(runs, arm, *metric) for metric in metrics.values()),
            ]
            for arm in config.arm_names
        ],
    )
    blocks: list[Block] = [reached, "Mean over the seeds +- half the width of its 95 % interval."]
    rows = [_comparison(runs, claim, claim.against) for claim in config.hypotheses if claim.against]
    if rows:
        header = ["hypothesis", "pair", "number", "difference", "p", "d", "detectable difference"]
        blocks.append(Table(header=header, rows=rows))
    return blocks


def _cell(runs: StudyRuns, arm: str, metric: str, reduce: Reduction) -> str:
    return _mean(runs.values(arm, metric, reduce)) if runs.has(arm, metric) else "-"


def _mean(values: Sequence[float]) -> str:
    found = estimate(values)
    if found.half_width is None:
        return f"{found.mean:.4f}"
    return f"{found.mean:.4f} +- {found.half_width:.4f}"


def _comparison(runs: StudyRuns, claim: Hypothesis, against: str) -> list[str]:
    found = compare(
        runs.values(claim.arm, claim.metric, claim.reduce),
        runs.values(against, claim.metric, claim.reduce),
    )
    difference = f"{found.difference.mean:+.4f}"
    if found.difference.half_width is not None:
        difference += f" +- {found.difference.half_width:.4f}"
    numbers = (found.p_value, found.effect_size, found.detectable)
    return [
        claim.name,
        f"{claim.arm} - {against}",
        claim.label,
        difference,
        *("-" if number is None else f"{number:.2g}" for number in numbers),
    ]


def _pictures(runs: StudyRuns) -> list[Block]:
    """The training loss, and every metric that is claimed something about or asked for."""
    arms = list(runs.records)
    loss = Picture(
        labels=arms,
        file="loss.png",
        caption="Training loss over tokens",
        label="next-token loss (nats per token)",
        curves=[
            band(arm, [losses_over_tokens(rows) for rows in records], smoothed=True)
            for arm, records in runs.records.items()
        ],
    )
    metrics = dict.fromkeys([*(c.metric for c in runs.config.hypotheses), *runs.config.curves])
    pictures: list[Block] = [loss]
    for metric in metrics:
        curves = [
            band(arm, [_over_tokens(rows, metric) for rows in records], smoothed=False)
            for arm, records in runs.records.items()
            if runs.has(arm, metric)
        ]
        if not curves:
            raise ValueError(f"curves: {metric}: no run has a record of it; use another")
        file = f"{metric.replace('/', '_')}.png"
        pictures.append(
            Picture(
                labels=arms,
                file=file,
                caption=f"{metric} over tokens",
                label=metric,
                curves=curves,
            )
        )
    return pictures


def _over_tokens(rows: Sequence[Row], metric: str) -> tuple[list[int], list[float]]:
    found = [(int(row["tokens"]), float(row[metric])) for row in rows if metric in row]
    return [tokens for tokens, _ in found], [value for _, value in found]


def band(arm: str, points: Sequence[tuple[list[int], list[float]]], *, smoothed: bool) -> Curve:
    """Mean and range over the seeds of an arm, as far as all of them go.

    Args:
        arm: label of the curve.
        points: tokens and values of each seed.
        smoothed: smooth each seed first.
    """
    values = [smooth(found) if smoothed else found for _, found in points]
    columns = list(zip(*values, strict=False))
    return Curve(
        label=arm,
        tokens=points[0][0][: len(columns)],
        loss=[fmean(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
    )


def _arms(runs: StudyRuns) -> list[Block]:
    """What the arms are, how large, and what training them cost."""
    base = runs.trials[runs.reference][0].config
    reference = size_of(base)
    rows = []
    for arm, trials in runs.trials.items():
        size = size_of(trials[0].config)
        changed = ", ".join(differences(to_plain(base), to_plain(trials[0].config)))
        speeds = [row["tokens_per_second"] for rows in runs.records[arm] for row in rows]
        seconds = [s for trial in trials if (s := cpu_seconds(trial.run_dir)) is not None]
        rows.append(
            [
                arm,
                changed or "-",
                f"{size.parameters:,} ({deviation(size.parameters, reference.parameters)})",
                f"{size.active_parameters:,} "
                f"({deviation(size.active_parameters, reference.active_parameters)})",
                f"{size.flops_per_token / 1e6:.3f}M "
                f"({deviation(size.flops_per_token, reference.flops_per_token)})",
                f"{sorted(speeds)[len(speeds) // 2]:,.0f}",
                f"{fmean(seconds):,.0f}" if len(seconds) == len(trials) else "-",
            ]
        )
    header = [
        "arm",
        f"differs from {runs.reference} in",
        "parameters",
        "active",
        "training FLOPs per token",
        "tokens/s",
        "CPU seconds of a run",
    ]
    tokens = runs.config.budget_tokens
    return [
        Table(header=header, rows=rows),
        f"Every run trains on {tokens:,} tokens. In brackets: deviation from {runs.reference}. Active "
        "are parameters that a token is multiplied with: no rows of tables, and of the routed experts "
        "its own only; FLOPs are those of the matrix products of forward and backward pass. Speed is the median over all steps; CPU seconds "
        "include start-up, evaluation and checkpoints, and depend on what else the machine did.",
    ]


def _checks(checks: Sequence[Check]) -> Bullets:
    return Bullets(
        items=[
            f"passed: {check.what}"
            if check.problem is None
            else f"FAILED: {check.what}: {check.problem}"
            for check in checks
        ]
    )
