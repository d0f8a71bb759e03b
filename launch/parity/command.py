"""Runs the reference and every layout, and prints the comparison; called by `launch.cli`.

Each is a run of its own in a temporary directory, with the launcher's ranks and the recipe's
loader, start values and step. What the ranks do is `train.parity`.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from launch.compose import RecipeError
from launch.layouts import TypedLayout
from launch.local import run_ranks
from launch.parity.blame import blame
from launch.parity.errors import FP64_BOUNDS, Outcome, compare_runs, fp32_bounds
from launch.parity.plan import Plan, make_plan
from launch.parity.report import Case, Report, print_json, print_table
from launch.runs import read_status
from train.config import RunConfig
from train.parity.task import Task
from train.recipe import save_resolved
from train.stop import STOPPED_EXIT_CODE


def parity(
    recipe: str,
    overrides: Sequence[str],
    *,
    layouts: Sequence[str],
    dtype: str | None,
    steps: int,
    as_json: bool,
) -> int:
    """Compare layouts with one rank and print the result.

    Args:
        recipe: name or file.
        overrides: of all runs.
        layouts: such as `dp2,ep2`.
        dtype: fp64 or fp32; None: fp64 where the backend has it.
        steps: optimizer steps.
        as_json: print one object instead of a table.

    Returns:
        0 all layouts compute the same, 1 some do not or a run failed.

    Raises:
        RecipeError: what was typed is wrong; nothing was started.
        KeyboardInterrupt: the runs were stopped.
    """
    started = time.monotonic()
    plan = make_plan(recipe, overrides, layouts, dtype, steps)
    with _workplace() as root:
        runs = _Runs(plan, root)
        if not runs.has_reference:
            return 1
        cases = [runs.case(layout) for layout in plan.layouts]
        report = Report.of(plan, runs.reference, cases, runs.noise, time.monotonic() - started)
    (print_json if as_json else print_table)(report)
    return 0 if all(case.outcome.ok for case in cases) else 1


@contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary directory for the runs. If one of them failed, its logs stay."""
    root = Path(tempfile.mkdtemp(prefix="mneme-parity-"))
    failed = False
    try:
        yield root
        failed = any(read_status(path)["state"] == "failed" for path in root.iterdir())
    finally:
        for path in root.glob("*/tensors") if failed else [root]:
            shutil.rmtree(path)


class _Runs:
    """Runs layouts, each once, and compares them with the reference, which runs first."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self._plan, self._root = plan, root
        self._outcomes: dict[TypedLayout, Outcome | None] = {}
        self._bounds = FP64_BOUNDS
        self.noise: Outcome | None = None
        """fp32: what rounding does to one rank."""
        task = Task(steps=plan.steps, reference=None, data_sizes=plan.data_sizes())
        self.reference = self._run("one rank", plan.reference, task)
        self.has_reference = self._failure(self.reference) is None
        if self.has_reference and plan.noise is not None:
            run = self._run("one rank, other microbatches", plan.noise, self._comparison())
            self.has_reference = self._failure(run) is None
            if self.has_reference:
                self.noise = compare_runs(self.reference, run, FP64_BOUNDS)
                self._bounds = fp32_bounds(self.noise)

    def case(self, layout: TypedLayout) -> Case:
        """A layout, and the axes to blame if it differs."""
        outcome = self._outcome(layout)
        assert outcome is not None, "the plan checked it"
        differs = outcome.first_difference is not None
        return Case(layout, outcome, blame(layout, self._differs) if differs else None)

    def _differs(self, layout: TypedLayout) -> bool | None:
        outcome = self._outcome(layout)
        return None if outcome is None else not outcome.ok

    def _outcome(self, layout: TypedLayout) -> Outcome | None:
        if layout not in self._outcomes:
            self._outcomes[layout] = self._compare(layout)
        return self._outcomes[layout]

    def _compare(self, layout: TypedLayout) -> Outcome | None:
        try:
            config = self._plan.config(layout)
        except RecipeError:
            return None
        run = self._run(str(layout), config, self._comparison())
        return compare_runs(self.reference, run, self._bounds, self._failure(run))

    def _comparison(self) -> Task:
        return Task(steps=self._plan.steps, reference=str(self.reference))

    def _run(self, name: str, config: RunConfig, task: Task) -> Path:
        """Run ranks to their end; their progress is not part of the answer, so not on stdout."""
        run_dir = self._root / name.replace(" ", "-").replace(",", "-")
        run_dir.mkdir()
        save_resolved(config, run_dir / "recipe.yaml")
        task.save(run_dir)
        print(f"{name}:", file=sys.stderr)
        with redirect_stdout(sys.stderr):
            code = run_ranks(run_dir, config, module="train.parity.run")
        if code == STOPPED_EXIT_CODE:
            raise KeyboardInterrupt
        return run_dir

    def _failure(self, run_dir: Path) -> str | None:
        status = read_status(run_dir)
        return None if status["state"] == "done" else str(status["reason"])
