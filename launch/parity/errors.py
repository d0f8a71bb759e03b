"""How far a run is from the reference: from what ranks wrote to errors and a verdict. No torch.

Errors are relative, with |x| the L2 norm of all elements of a tensor:

    loss, grad_norm    largest |loss - reference| / |reference loss| over the loss and its parts;
                       |norm - reference| / reference
    output, parameter  |x - reference| / |reference|
    gradient           |g - reference| / max(|reference|, 1e-6 x global gradient norm), because a
                       gradient may be zero, or no more than the rounding of larger ones
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.runs import read_metrics
from train.parity.task import Finding, read_findings

GRADIENT_FLOOR = 1e-6
"""Gradients below this share of the global norm are compared with that, not with themselves."""

FP64_BOUNDS = {
    "loss": 1e-12,
    "gradient norm": 1e-12,
    "gradient": 1e-9,
    "parameter": 1e-10,
    "output": 1e-12,
}
"""Largest error by kind. Outputs only say where a difference begins; the others decide."""

NOISE_FACTOR = 5
"""fp32: how many times as much as another number of microbatches a layout may change a number."""
_FP32_BOUND = 2e-6
"""fp32: of losses and gradient norm, if they are not noisier than that by themselves."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """Of one number or tensor in one step."""

    step: int
    kind: str
    """output, loss, gradient, gradient norm or parameter."""
    name: str
    value: float
    """Relative; infinite if nobody compared the tensor."""

    def __str__(self) -> str:
        what = {
            "output": f"output of {self.name}",
            "gradient": f"gradient of {self.name}",
            "parameter": f"{self.name} after the update",
        }.get(self.kind, self.name)
        return f"{what} in step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A layout against one rank."""

    errors: list[Error]
    """In the order of execution."""
    bounds: Mapping[str, float]
    """By kind."""
    failure: str | None = None
    """Why the run did not reach its end."""

    def worst(self, kind: str) -> Error | None:
        """The largest error of a kind; None if the run did not come that far."""
        return max((error for error in self.errors if error.kind == kind), key=_size, default=None)

    @property
    def first_difference(self) -> Error | None:
        """The first error beyond its bound, or beyond an output's if that is where it began."""
        if self.ok:
            return None
        return next((error for error in self.errors if self._is_beyond(error)), None)

    @property
    def ok(self) -> bool:
        """Whether the layout computes the same."""
        decisive = (error for error in self.errors if error.kind != "output")
        return self.failure is None and not any(self._is_beyond(error) for error in decisive)

    def _is_beyond(self, error: Error) -> bool:
        return not error.value <= self.bounds[error.kind]  # nan is


def compare_runs(
    reference: Path, run: Path, bounds: Mapping[str, float], failure: str | None = None
) -> Outcome:
    """Read what the ranks of both runs wrote.

    Args:
        reference: run directory of the one rank.
        run: that of the layout.
        bounds: largest error of each kind.
        failure: why the layout's run did not reach its end; then what is missing is no difference.
    """
    wanted, got = (
        {int(row["step"]): row for row in read_metrics(path)} for path in (reference, run)
    )
    found = _compared(read_findings(run), {step: row["grad_norm"] for step, row in wanted.items()})
    [executed] = read_findings(reference)
    errors: list[Error] = []
    for step in wanted:

        def tensors(kind: str, step: int = step) -> list[Error]:
            """Those of the reference, in the order of the forward pass."""
            missing = None if failure else math.inf
            names = {f.name: None for f in executed if (f.step, f.kind) == (step, kind)}
            values = {name: found.get((step, kind, name), missing) for name in names}
            return [
                Error(step=step, kind=kind, name=name, value=value)
                for name, value in values.items()
                if value is not None
            ]

        losses, norm = [], []
        if step in got:
            losses = _losses(step, got[step], wanted[step])
            norm = [_norm(step, got[step]["grad_norm"], wanted[step]["grad_norm"])]
        errors += [*tensors("output"), *losses, *reversed(tensors("gradient"))]
        errors += [*norm, *tensors("parameter")]
    return Outcome(errors=errors, bounds=bounds, failure=failure)


def fp32_bounds(noise: Outcome) -> dict[str, float]:
    """Bounds from what the rounding of fp32 does to one rank with another number of microbatches."""
    bounds = {}
    for kind in FP64_BOUNDS:
        worst = noise.worst(kind)
        assert worst is not None, f"{kind}: the noise was not measured"
        least = _FP32_BOUND if kind in ("loss", "gradient norm") else 0.0
        bounds[kind] = max(least, NOISE_FACTOR * worst.value)
    return bounds


def _compared(
    findings: list[list[Finding]], norms: Mapping[int, float]
) -> dict[tuple[int, str, str], float]:
    """Relative errors; the pieces of an output add up, of a whole tensor the worst copy counts."""
    pieces: dict[tuple[int, str, str], list[Finding]] = defaultdict(list)
    for finding in (finding for rank in findings for finding in rank):
        pieces[finding.step, finding.kind, finding.name].append(finding)
    errors = {}
    for place, parts in pieces.items():
        step, kind, _ = place
        floor = GRADIENT_FLOOR * norms[step] if kind == "gradient" else 0.0
        if kind == "output":
            sums = [(sum(p.difference for p in parts), sum(p.reference for p in parts))]
        else:
            sums = [(part.difference, part.reference) for part in parts]
        values = [_ratio(math.sqrt(d), max(math.sqrt(r), floor)) for d, r in sums]
        errors[place] = max(values, key=_order)
    return errors


def _losses(step: int, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Error]:
    """Of the parts first, as they are computed, then of the whole."""
    errors = []
    for name in sorted((key for key in wanted if key.startswith("loss")), reverse=True):
        value = _ratio(abs(got[name] - wanted[name]), abs(wanted["loss"]))
        errors.append(Error(step=step, kind="loss", name=name, value=value))
    return errors


def _norm(step: int, got: float, wanted: float) -> Error:
    value = _ratio(abs(got - wanted), abs(wanted))
    return Error(step=step, kind="gradient norm", name="gradient norm", value=value)


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size else math.inf


def _size(error: Error) -> float:
    return _order(error.value)


def _order(value: float) -> float:
    """For comparing: nan is worse than any number."""
    return math.inf if math.isnan(value) else value
