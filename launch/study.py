"""`mneme ablate`: run a study, which is a few variants ("arms") of one recipe over several seeds.

Called by `launch.cli`. Every arm trains in a process of its own (`mneme train`), so a study that
was stopped, or that failed in one arm, goes on where it was when the command is typed again.
At one seed all arms see the same data in the same order: the order depends only on the seed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch.runs import read_metrics, read_status
from launch.study_config import load_study
from launch.study_cost import measured
from launch.study_plan import Trial, plan_trials
from launch.study_report import StudyRuns, write_study_report
from launch.study_size import deviation, size_of
from train.lifetime import LAUNCHER_PID
from train.stop import STOPPED_EXIT_CODE

MNEME = (sys.executable, "-m", "launch.cli")
UNFAIR = 1
"""Exit code: all runs are done, and a check of the report has failed."""


def run_study(
    study: str,
    *,
    seeds: int | None,
    runs_dir: Path,
    overrides: Sequence[str],
    output: Path | None = None,
    command: Sequence[str] = MNEME,
) -> int:
    """Train every arm at every seed under `runs_dir`/study-NAME, then write the report.

    Arms that are done are not trained again; those that were interrupted are resumed.

    Args:
        study: name or file of the study.
        seeds: number of seeds; None takes the study's.
        runs_dir: where runs are kept.
        overrides: for all arms, after the study's own and before those of the arm.
        output: folder of the report; None: `report` beside the runs.
        command: how to call `mneme`.

    Returns:
        0 with the report written, 1 if it says that the study was not fair, 85 stopped on request,
        else the code of the arm that failed.

    Raises:
        ValueError: the study, an override of an arm or a run that is already there is wrong;
            raised before anything is trained. Or a hypothesis is about a metric that no run records.
    """
    config = load_study(study)
    directory = runs_dir / f"study-{config.name}"
    num_seeds = config.seeds if seeds is None else seeds
    trials = plan_trials(config, num_seeds, directory, overrides)
    _print_plan(trials)
    with _stoppable() as child:
        code = _train_all(trials, config.recipe, command, child)
    if code != 0:
        return code
    runs = StudyRuns.read(config, trials)
    page, answers, fair = write_study_report(runs, output or directory / "report")
    print("\n".join([*answers, f"report: {page}"]), flush=True)
    if not fair:
        print(f"not fair: a check has failed, see {page}", file=sys.stderr)
    return 0 if fair else UNFAIR


def _print_plan(trials: Sequence[Trial]) -> None:
    """Sizes of the arms, the first being what the others are compared with."""
    first = [trial for trial in trials if trial.seed == 0]
    sizes = [size_of(trial.config) for trial in first]
    for trial, size in zip(first, sizes, strict=True):
        total, flops = size.parameters, size.flops_per_token
        print(
            f"{trial.arm}: {total:,} parameters ({deviation(total, sizes[0].parameters)}), "
            f"{size.active_parameters:,} active, {flops / 1e6:.3f}M training FLOPs per token "
            f"({deviation(flops, sizes[0].flops_per_token)})",
            flush=True,
        )


def _train_all(
    trials: Sequence[Trial], recipe: str, command: Sequence[str], child: "_Child"
) -> int:
    """Bring all trials to their ends; returns the exit code of the study if it ends before, else 0."""
    waiting = [trial for trial in trials if not _is_done(trial)]
    started = time.monotonic()
    for number, trial in enumerate(trials, start=1):
        what = f"[{number}/{len(trials)}] {trial.arm}, seed {trial.seed}"
        if trial not in waiting:
            print(f"{what}: done before", flush=True)
            continue
        code = _train(trial, recipe, what, command, child)
        if code != 0:
            return code
        done = waiting.index(trial) + 1
        left = (time.monotonic() - started) / done * (len(waiting) - done)
        last = (read_metrics(trial.run_dir) or [{}])[-1]
        loss = last.get("validation/loss")
        reached = "" if loss is None else f"held-out loss {loss:.4f}, "
        print(f"{what}: {reached}about {left / 60:.0f} min left", flush=True)
    return 0


def _is_done(trial: Trial) -> bool:
    return bool(read_status(trial.run_dir)["state"] == "done")


class _Child:
    """The training process under way, and whether the user wants to stop."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a stop request on: the child saves and leaves."""
        self.stopping = True
        if self.process is not None:
            self.process.send_signal(number)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end; returns its exit code, 85 if a stop request ended it."""
        # A group of its own: Ctrl-C would otherwise reach the child twice, which may mean "at once".
        environment = os.environ | {LAUNCHER_PID: str(os.getpid())}  # it ends if we are killed
        self.process = subprocess.Popen(command, process_group=0, env=environment)
        if self.stopping:
            self.process.terminate()
        code = self.process.wait()
        self.process = None
        # A child that could not save yet was killed by the signal, and has nothing to lose.
        return STOPPED_EXIT_CODE if self.stopping and code < 0 else code


@contextmanager
def _stoppable() -> Iterator[_Child]:
    """SIGINT, SIGTERM and SIGUSR1 go to the child as long as this lasts."""
    child = _Child()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, child.forward) for number in numbers}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(trial: Trial, recipe: str, what: str, command: Sequence[str], child: _Child) -> int:
    """Bring one trial to its end; returns the exit code of the study if it has to end here, else 0."""
    if child.stopping:
        return STOPPED_EXIT_CODE
    if (trial.run_dir / "recipe.yaml").is_file():
        print(f"{what}: goes on in {trial.run_dir}", flush=True)
        arguments = ["resume", str(trial.run_dir)]
    else:
        print(f"{what}: starts in {trial.run_dir}", flush=True)
        arguments = ["train", recipe, *trial.overrides, "--run-dir", str(trial.run_dir)]
    with measured(trial.run_dir):
        code = child.run([*command, *arguments])
    if code == STOPPED_EXIT_CODE:
        print("stopped; the same command goes on from here", flush=True)
    elif code != 0:
        logs = f"; mneme logs {trial.run_dir}" if (trial.run_dir / "logs").is_dir() else ""
        print(
            f"{what}: failed with exit code {code}; the same command goes on from here{logs}",
            file=sys.stderr,
        )
    return code
