"""`mneme ablate`: run a study, which is a few variants ("arms") of one recipe over several seeds.

Called by `launch.cli`. Every arm trains in a process of its own (`mneme train`), so a study that
was stopped, or that failed in one arm, goes on where it was when the command is typed again.
At one seed all arms see the same data in the same order: the order depends only on the seed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Annotated, ClassVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from launch.catalog import options
from launch.compare import differences
from launch.compose import RecipeError, compose
from launch.runs import read_status
from launch.study_report import write_study_report
from train.config import RunConfig
from train.lifetime import LAUNCHER_PID
from train.recipe import load_resolved, to_plain
from train.stop import STOPPED_EXIT_CODE

MNEME = (sys.executable, "-m", "launch.cli")

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Names become directories."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A study, `recipes/study/NAME.yaml`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: _Name
    description: str
    """One line for `mneme list`."""
    question: str
    """The sentence that the report answers."""
    recipe: str
    """What all arms start from: a recipe's name or file."""
    overrides: list[str] = field(default_factory=list)
    """For all arms, before those of the arm."""
    arms: Annotated[dict[_Name, list[str]], Field(min_length=2)]
    """Name -> its overrides. The first arm is the one that the others are compared with."""
    seeds: Annotated[int, Field(ge=1, strict=True)] = 3
    """Seeds 0, 1, ... that every arm trains with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """One arm at one seed."""

    arm: str
    seed: int
    overrides: list[str]
    run_dir: Path
    config: RunConfig


def load_study(study: str) -> StudyConfig:
    """Read a study by its name under `recipes/study/`, or from a user's file.

    Raises:
        ValueError: no such study, or not a valid one; lists everything that is wrong.
    """
    known = options("study")
    path = known.get(study, Path(study))
    if not path.is_file():
        near = ", ".join(get_close_matches(study, known, n=3) or known)
        raise ValueError(f"{study}: no such study; use {near}, or give a path to a .yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(StudyConfig).validate_python(content)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [_problem(details) for details in error.errors(include_url=False)]
        raise ValueError(f"{path}: not a study:\n" + "\n".join(lines)) from error


def _problem(details: ErrorDetails) -> str:
    *place, last = ["", *details["loc"]]
    if last == "[key]":
        return f'arms: {details["input"]}: a name has to be text; put it in quotes, like "on"'
    return f"{'.'.join(map(str, [*place[1:], last])) or 'file'}: {details['msg']}"


def run_study(
    study: str,
    *,
    seeds: int | None,
    runs_dir: Path,
    overrides: Sequence[str],
    command: Sequence[str] = MNEME,
) -> int:
    """Train every arm at every seed under `runs_dir`/study-NAME, then write the report there.

    Arms that are done are not trained again; those that were interrupted are resumed.

    Args:
        study: name or file of the study.
        seeds: number of seeds; None takes the study's.
        runs_dir: where runs are kept.
        overrides: for all arms, after the study's own and before those of the arm.
        command: how to call `mneme`.

    Returns:
        0 with the report written, 85 stopped on request, else the code of the arm that failed.

    Raises:
        ValueError: the study, an override of an arm or a run that is already there is wrong;
            raised before anything is trained.
    """
    config = load_study(study)
    directory = runs_dir / f"study-{config.name}"
    num_seeds = config.seeds if seeds is None else seeds
    trials = _plan(config, num_seeds, directory, overrides)
    with _stoppable() as child:
        for number, trial in enumerate(trials, start=1):
            code = _train(trial, config.recipe, f"[{number}/{len(trials)}]", command, child)
            if code != 0:
                return code
    runs = {arm: [trial.run_dir for trial in trials if trial.arm == arm] for arm in config.arms}
    page, verdicts = write_study_report(
        f"Study {config.name}", config.question, runs, directory / "report"
    )
    print("\n".join([*verdicts, f"report: {page}"]), flush=True)
    return 0


def _plan(
    config: StudyConfig, num_seeds: int, directory: Path, overrides: Sequence[str]
) -> list[_Trial]:
    """Compose every trial, seed by seed, and check it against what is on disk."""
    if num_seeds < 1:
        raise ValueError(f"seeds={num_seeds}: at least 1; use --seeds {config.seeds}")
    trials, problems = [], []
    for seed in range(num_seeds):
        for arm, changes in config.arms.items():
            typed = [*config.overrides, *overrides, *changes]
            problems += _check_no_seed(arm, typed)
            typed.append(f"train.seed={seed}")
            try:
                recipe = compose(config.recipe, typed).config
            except RecipeError as error:
                problems += [f"{arm}: {line}" for line in error.problems]
                continue
            run_dir = directory / f"{arm}-seed{seed}"
            trials.append(
                _Trial(arm=arm, seed=seed, overrides=typed, run_dir=run_dir, config=recipe)
            )
            problems += _check_same_recipe(run_dir, recipe)
    problems = list(dict.fromkeys(problems)) or _check_arms_differ(trials)
    if problems:
        raise ValueError(f"study {config.name}:\n" + "\n".join(problems))
    return trials


def _check_no_seed(arm: str, overrides: Sequence[str]) -> list[str]:
    return [
        f"{arm}: {text}: a study sets the seeds itself; use --seeds N"
        for text in overrides
        if text.startswith("train.seed=")
    ]


def _check_same_recipe(run_dir: Path, recipe: RunConfig) -> list[str]:
    """A run that is already there has to be of this recipe, or it would answer another question."""
    if not (run_dir / "recipe.yaml").is_file():
        return []
    changed = list(differences(to_plain(load_resolved(run_dir / "recipe.yaml")), to_plain(recipe)))
    if not changed:
        return []
    return [
        f"{run_dir}: holds a run of another recipe, this one has {', '.join(changed)}; "
        "remove the directory or use another --runs-dir"
    ]


def _check_arms_differ(trials: Sequence[_Trial]) -> list[str]:
    first = [trial for trial in trials if trial.seed == 0]
    return [
        f"{a.arm} and {b.arm}: the same recipe; an override for all arms undoes their difference?"
        for i, a in enumerate(first)
        for b in first[i + 1 :]
        if a.config == b.config
    ]


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


def _train(trial: _Trial, recipe: str, progress: str, command: Sequence[str], child: _Child) -> int:
    """Bring one trial to its end; returns the exit code of the study if it has to end here, else 0."""
    what = f"{progress} {trial.arm}, seed {trial.seed}"
    if read_status(trial.run_dir)["state"] == "done":
        print(f"{what}: done before", flush=True)
        return 0
    if child.stopping:
        return STOPPED_EXIT_CODE
    if (trial.run_dir / "recipe.yaml").is_file():
        print(f"{what}: goes on in {trial.run_dir}", flush=True)
        arguments = ["resume", str(trial.run_dir)]
    else:
        print(f"{what}: starts in {trial.run_dir}", flush=True)
        arguments = ["train", recipe, *trial.overrides, "--run-dir", str(trial.run_dir)]
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
