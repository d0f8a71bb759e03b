"""What `mneme parity` prints: a table for people, one object for programs."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.layouts import TypedLayout
from launch.parity.blame import Blame
from launch.parity.errors import FP64_BOUNDS, NOISE_FACTOR, Error, Outcome
from launch.parity.plan import Plan
from train.config import RunConfig
from train.parity.task import read_findings
from train.stages import phases

_PLURAL = {
    "output": "outputs",
    "gradient": "gradients",
    "parameter": "parameters and buffers",
}


@dataclass(frozen=True)
class Case:
    """A layout that was asked for."""

    layout: TypedLayout
    outcome: Outcome
    blame: Blame | None = None
    """What makes it differ."""

    @property
    def first_difference(self) -> str | None:
        """The tensor, and the axes that are to blame; None if nothing differs."""
        error = self.outcome.first_difference
        return None if error is None else f"{error}, by {self.blame}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is printed."""

    recipe: str
    config: RunConfig
    """Of the reference."""
    steps: int
    notes: list[str]
    num_tensors: Mapping[str, int]
    """Compared in every step, by kind."""
    cases: list[Case]
    noise: Outcome | None
    seconds: float

    @classmethod
    def of(
        cls, plan: Plan, reference: Path, cases: list[Case], noise: Outcome | None, seconds: float
    ) -> "Report":
        """Put together what is known when all runs have ended."""
        [findings] = read_findings(reference)
        tensors = {(finding.kind, finding.name) for finding in findings}
        return cls(
            recipe=plan.recipe,
            config=plan.reference,
            steps=plan.steps,
            notes=plan.notes,
            num_tensors={kind: sum(k == kind for k, _ in tensors) for kind in _PLURAL},
            cases=cases,
            noise=noise,
            seconds=seconds,
        )


def print_json(report: Report) -> None:
    """Print one object; relative errors, null where there is none, or no finite one."""
    answer = {
        "recipe": report.recipe,
        "dtype": report.config.train.dtype,
        "steps": report.steps,
        "layouts": [_row(case) for case in report.cases],
    }
    print(json.dumps(answer, indent=2))


def _row(case: Case) -> dict[str, Any]:
    outcome = case.outcome
    worst = {kind: outcome.worst(kind) for kind in FP64_BOUNDS}
    return {
        "layout": str(case.layout),
        "loss_error": _finite(worst["loss"]),
        "grad_norm_error": _finite(worst["gradient norm"]),
        "max_grad_error": _finite(worst["gradient"]),
        "max_grad_error_of": None if worst["gradient"] is None else worst["gradient"].name,
        "max_parameter_error": _finite(worst["parameter"]),
        "first_difference": case.first_difference,
        "axes": None if case.blame is None else list(case.blame.axes),
        "failure": outcome.failure,
        "ok": outcome.ok,
    }


def print_table(report: Report) -> None:
    """Print a line per layout, and below it what differs."""
    config, phase = report.config, phases(report.config)[0]
    print(
        f"{report.recipe} in {config.train.dtype} against one rank: {report.steps} optimizer "
        f"step{'s' if report.steps > 1 else ''}, {phase.global_batch_size} sequences of "
        f"{phase.sequence_length} tokens"
    )
    print(", ".join(f"{report.num_tensors[kind]} {word}" for kind, word in _PLURAL.items()))
    for line in [*report.notes, *_noise_lines(report.noise)]:
        print(line)
    bounds = report.cases[0].outcome.bounds
    head = [
        "layout",
        "ranks",
        "loss",
        "gradient norm",
        "gradient",
        "parameter",
        "",
        "worst gradient",
    ]
    kinds = ["loss", "gradient norm", "gradient", "parameter"]
    rows = [head, ["at most", "", *(f"{bounds[kind]:.0e}" for kind in kinds), "", ""]]
    for case in report.cases:
        worst = case.outcome.worst("gradient")
        ranks = math.prod(size for axis, size in case.layout.sizes if axis != "ep")
        errors = [_cell(case.outcome.worst(kind)) for kind in kinds]
        verdict = "ok" if case.outcome.ok else "FAILED" if case.outcome.failure else "DIFFERS"
        name = "" if worst is None else worst.name
        rows.append([str(case.layout), str(ranks), *errors, verdict, name])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    for case in report.cases:
        _explain(case)
    print(f"{report.seconds:.0f} s")


def _explain(case: Case) -> None:
    error, failure = case.outcome.first_difference, case.outcome.failure
    if failure is not None:
        print(f"{case.layout} failed: {failure}")
    if error is not None:
        print(f"{case.layout} differs first in the {case.first_difference} ({error.value:.1e})")


def _noise_lines(noise: Outcome | None) -> list[str]:
    """fp32: where the bounds come from."""
    if noise is None:
        return []
    worst = [error for kind in _PLURAL if (error := noise.worst(kind)) is not None]
    sizes = ", ".join(f"{error.kind} {error.value:.1e} ({error.name})" for error in worst)
    return [
        f"one rank with other microbatches differs from itself by: {sizes}",
        f"which is multiplied by {NOISE_FACTOR} to bound the layouts' errors",
    ]


def _cell(error: Error | None) -> str:
    return "-" if error is None else f"{error.value:.1e}"


def _finite(error: Error | None) -> float | None:
    return error.value if error is not None and math.isfinite(error.value) else None
