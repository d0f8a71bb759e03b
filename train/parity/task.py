"""What the launcher tells the ranks of `mneme parity`, and what they tell it. No torch.

RUN/parity.json              the task, written by the launcher
RUN/metrics.jsonl            losses and gradient norm of each step, as in a training run
RUN/findings-R.jsonl         what rank R saw, a line per tensor, in the order of execution
RUN/tensors/...              every tensor, if the run is the reference
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

Kind = Literal["output", "gradient", "parameter"]
"""Output of a module, gradient before clipping, parameter or buffer after the update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the ranks of one run do."""

    steps: int
    """Optimizer steps, from the first of the recipe."""
    reference: str | None
    """Run directory of the one rank to compare with; None: this run is it, and writes tensors."""
    data_sizes: tuple[int, ...] = (1,)
    """Data-parallel sizes of the runs that are compared with a reference: it writes the outputs of
    the microbatches that are the first of a rank in some of them."""

    def save(self, run_dir: Path) -> None:
        """Write the task for the ranks of a run."""
        (run_dir / "parity.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, run_dir: Path) -> "Task":
        """Read the task of a run."""
        content = json.loads((run_dir / "parity.json").read_text(encoding="utf-8"))
        return cls(**content | {"data_sizes": tuple(content["data_sizes"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One tensor, or a rank's piece of it: sums over its elements, so that pieces add up."""

    step: int
    kind: Kind
    name: str
    difference: float
    """Squares of the differences to the reference; 0 in the reference itself."""
    reference: float
    """Squares of the reference."""


class Findings:
    """The file of one rank. A context manager; every line is there as soon as it is written."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = (run_dir / f"findings-{rank}.jsonl").open("w", encoding="utf-8")

    def write(self, finding: Finding) -> None:
        """Append a line. A rank that fails later leaves what it saw before."""
        self._file.write(json.dumps(asdict(finding)) + "\n")
        self._file.flush()

    def __enter__(self) -> "Findings":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_findings(run_dir: Path) -> list[list[Finding]]:
    """The findings of every rank, in rank order."""
    files = sorted(run_dir.glob("findings-*.jsonl"), key=lambda path: int(path.stem[9:]))
    return [
        [Finding(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in files
    ]
