"""Run the ranks of a run on this machine, from start to verdict.

`launch.start` calls `run_ranks`. It owns the signals: the first stop request is passed on to the
ranks, which save and leave; whatever happens, no process is left when it returns.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from launch.progress import ProgressLine
from launch.ranks import Runner, available_cores, first_failure, no_survivors, reserved_port
from launch.run_dir import held, next_attempt, write_status
from launch.validate import world_size
from train.checkpoint.commit import newest_checkpoint
from train.config import RunConfig
from train.lifetime import LAUNCHER_PID, die_with_parent
from train.stop import ALARM_EXIT_CODE, STOPPED_EXIT_CODE

_POLL_SECONDS = 0.05

_VICTIM_SECONDS = 1.0
"""Time for the other ranks to notice that one failed, and to log what they saw."""

_REPORT_SECONDS = 10.0
"""Time for the runner, whose ranks are gone, to tell how they ended; it needs a fraction."""

_SAME_KEYSTROKE_SECONDS = 0.5
"""A wrapper (make, a shell) may pass on the SIGINT that the terminal has also sent."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended."""

    state: str
    """done, stopped or failed."""
    reason: str
    exit_code: int


class StopSignals:
    """Catches stop requests to the launcher while it is open; the old handlers come back after."""

    _CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal."""
        self.at_once = False
        """A further Ctrl-C: do not wait for a checkpoint."""
        self._time = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self._CAUGHT:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._time = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._time > _SAME_KEYSTROKE_SECONDS:
            self.at_once = True


def run_ranks(run_dir: Path, config: RunConfig, *, module: str = "train.run") -> int:
    """Run every rank of `run_dir` to its end; must be called from the main thread.

    Writes `status.json` and the logs, shows progress, and prints why a run failed.

    Args:
        run_dir: holds the `recipe.yaml` that the ranks read.
        config: the same recipe.
        module: what a rank runs, as `python -m MODULE RUN_DIR`.

    Returns:
        0 done, 85 stopped on request after saving, 86 the same for an alarm, 1 failed.

    Raises:
        RunDirError: another launcher is at work in `run_dir`.
    """
    if LAUNCHER_PID in os.environ:
        die_with_parent()  # a study started us
    count = world_size(config)
    with ExitStack() as stack:
        stack.enter_context(held(run_dir))
        signals = stack.enter_context(StopSignals())
        port = stack.enter_context(reserved_port())
        attempt = next_attempt(run_dir)
        logs = run_dir / "logs" / f"attempt-{attempt}"
        logs.mkdir(parents=True)
        write_status(run_dir, state="running", reason=f"attempt {attempt}", ranks=count)
        newest = newest_checkpoint(run_dir)
        line = ProgressLine(
            run_dir,
            steps=config.train.steps,
            first_step=newest[0] if newest else 0,
            ranks=count,
        )
        with no_survivors():
            runner = Runner(
                run_dir,
                logs,
                module=module,
                count=count,
                port=port,
                threads=config.launch.threads_per_rank or max(1, available_cores() // count),
            )
            try:
                with line:
                    verdict = _supervise(runner, signals, line, config.launch.stop_deadline_seconds)
            finally:
                runner.kill()
        write_status(run_dir, state=verdict.state, reason=verdict.reason, ranks=count)
    if verdict.state == "failed":
        print(verdict.reason, file=sys.stderr)
    return verdict.exit_code


def _supervise(
    runner: Runner, signals: StopSignals, line: ProgressLine, deadline_seconds: float
) -> Verdict:
    """Wait for all ranks to leave, or for a reason to end them."""
    deadline = None
    while runner.is_running():
        ranks = runner.ranks()
        if any(rank.failed() for rank in ranks):
            _end_victims(runner)
            break
        if signals.at_once:
            return _failed("killed at the second Ctrl-C, without saving")
        if deadline is None and (signals.requested or any(rank.stopped() for rank in ranks)):
            line.say(f"{signals.requested or 'stop'}: saving a checkpoint; Ctrl-C again kills")
            deadline = time.monotonic() + deadline_seconds
        if deadline is not None:
            for rank in ranks:
                rank.ask_to_stop()
            if time.monotonic() > deadline:
                return _too_late(runner, deadline_seconds)
        time.sleep(_POLL_SECONDS)
    return _verdict(runner, signals)


def _end_victims(runner: Runner) -> None:
    """Give the other ranks a moment to leave by themselves, then let the runner tell."""
    ranks = runner.ranks()
    _wait(lambda: not any(rank.is_running() for rank in ranks), _VICTIM_SECONDS)
    for rank in ranks:
        rank.kill()
    _wait(lambda: not runner.is_running(), _REPORT_SECONDS)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _verdict(runner: Runner, signals: StopSignals) -> Verdict:
    """What the exit codes of all ranks mean."""
    if not runner.tells_exit_codes():
        return _failed(f"{runner.explain()}\nits log: {runner.log}")
    culprit = first_failure(runner.ranks())
    if culprit is not None:
        return _failed(f"{culprit.explain()}\nits log: {culprit.log}")
    if any(rank.alarmed() for rank in runner.ranks()):
        reason = "stopped by an alarm (see events.jsonl), checkpoint saved"
        return Verdict(state="stopped", reason=reason, exit_code=ALARM_EXIT_CODE)
    if any(rank.stopped() for rank in runner.ranks()):
        reason = f"stopped on {signals.requested or 'request to a rank'}, checkpoint saved"
        return Verdict(state="stopped", reason=reason, exit_code=STOPPED_EXIT_CODE)
    return Verdict(state="done", reason="all steps done", exit_code=0)


def _too_late(runner: Runner, deadline_seconds: float) -> Verdict:
    late = [rank for rank in runner.ranks() if rank.is_running()]
    who = f"rank {', '.join(str(rank.number) for rank in late)}" if late else "the runner"
    return _failed(
        f"{who} had not saved and left {deadline_seconds:g} s after the stop request and was "
        "killed; raise launch.stop_deadline_seconds if a checkpoint takes longer\n"
        f"its log: {late[0].log if late else runner.log}"
    )


def _failed(reason: str) -> Verdict:
    return Verdict(state="failed", reason=reason, exit_code=1)
