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
from dataclasses import replace
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
        if not runs.run_reference():
            return 1
        cases = [runs.case(layout) for layout in plan.layouts]
        report = Report.of(plan, runs.reference, cases, runs.noise, time.monotonic() - started)
    (print_json if as_json else print_table)(report)
    return 0 if all(case.outcome.ok for case in cases) else 1


@contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary directory for the runs. If one of them failed, the logs stay."""
    root = Path(tempfile.mkdtemp(prefix="mneme-parity-"))
    failed = False
    try:
        yield root
        failed = any(read_status(path)["state"] == "failed" for path in root.iterdir())
    finally:
        for path in root.glob("*/tensors") if failed else [root]:
            shutil.rmtree(path)
        if failed:
            print(f"the logs are in {root}", file=sys.stderr)


class _Runs:
    """Runs layouts, each once, and compares them with the reference."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self._plan, self._root = plan, root
        self.reference = root / "one-rank"
        self.noise: Outcome | None = None
        """fp32: what rounding does to one rank."""
        self._bounds = FP64_BOUNDS
        self._outcomes: dict[TypedLayout, Outcome | None] = {}

    def run_reference(self) -> bool:
        """Run what the layouts are compared with; False if that failed."""
        plan = self._plan
        task = Task(steps=plan.steps, reference=None, data_sizes=plan.data_sizes())
        if self._run(self.reference, plan.reference, task) is not None:
            return False
        if plan.noise is not None:
            other = self._root / "one-rank-with-other-microbatches"
            if self._run(other, plan.noise, self._comparison()) is not None:
                return False
            self.noise = compare_runs(self.reference, other, FP64_BOUNDS)
            self._bounds = fp32_bounds(self.noise)
        return True

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
        run_dir = self._root / str(layout).replace(",", "-")
        failure = self._run(run_dir, config, self._comparison())
        return compare_runs(self.reference, run_dir, self._bounds, failure)

    def _comparison(self) -> Task:
        return Task(steps=self._plan.steps, reference=str(self.reference))

    def _run(self, run_dir: Path, config: RunConfig, task: Task) -> str | None:
        """Run ranks to their end; the answer says why they did not reach it.

        Their progress is not part of what the command answers: it goes to stderr.
        """
        run_dir.mkdir()
        # A layout that fails is a finding.
        once = replace(config.launch, nodes=1, max_restarts_without_progress=0)
        config = replace(config, launch=once)
        save_resolved(config, run_dir / "recipe.yaml")
        task.save(run_dir)
        print(f"{run_dir.name}:", file=sys.stderr)
        with redirect_stdout(sys.stderr):
            code = run_ranks(run_dir, config, module="train.parity.run")
        if code == STOPPED_EXIT_CODE:
            raise KeyboardInterrupt
        return None if code == 0 else str(read_status(run_dir)["reason"])
