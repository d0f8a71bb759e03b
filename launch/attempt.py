"""One attempt of a run on this node: start its ranks, watch them to their end, say how it ended.

`launch.local` and `launch.node` call `run_attempt`. It passes stop requests on to the ranks, which
save and leave; whatever happens, no process is left when it returns.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from launch.host import available_cores, no_survivors
from launch.ranks import FailureOrder, Node, Rank, Runner, first_failure, order_of_failure
from train.config import RunConfig
from train.stop import ALARM_EXIT_CODE, STOPPED_EXIT_CODE

POLL_SECONDS = 0.05

_VICTIM_SECONDS = 1.0
"""Time for the other ranks to notice that one failed, and to log what they saw."""

_REPORT_SECONDS = 10.0
"""Time for the runner, whose ranks are gone, to tell how they ended; it needs a fraction."""

_SAME_KEYSTROKE_SECONDS = 0.5
"""A wrapper (make, a shell) may pass on the SIGINT that the terminal has also sent."""

_LAST: FailureOrder = (True, float("inf"), True)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended."""

    state: str
    """done, stopped or failed."""
    reason: str
    exit_code: int
    rank: int | None = None
    """That failed first; None: none did, or it is not known."""
    order: FailureOrder = _LAST
    """Of several nodes that failed, the smallest says why."""
    wrong_input: bool = False
    """The rank left because of what the user gave."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is to be run on this node."""

    run_dir: Path
    config: RunConfig
    """The recipe that lies in `run_dir`."""
    module: str
    """What a rank runs, as `python -m MODULE RUN_DIR`."""
    number: int
    """From 1."""
    node: Node
    endpoint: str
    """HOST:PORT where the ranks of all nodes meet."""

    @property
    def logs(self) -> Path:
        """Its folder of logs."""
        return self.run_dir / "logs" / f"attempt-{self.number}"


class Others(Protocol):
    """The other nodes of the run, as one node sees them during an attempt."""

    def failed(self) -> bool:
        """Whether the attempt has failed elsewhere, so that the ranks here are victims."""

    def stop_requested(self) -> str | None:
        """Name of the signal that another node was sent."""

    def ask_to_stop(self, name: str) -> None:
        """Pass a stop request on to the other nodes; may be called again and again."""


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


def run_attempt(
    attempt: Attempt, signals: StopSignals, others: Others, say: Callable[[str], None]
) -> Verdict:
    """Run the ranks of this node to their end; must be called from the main thread.

    Args:
        attempt: what to run.
        signals: stop requests to this process.
        others: the other nodes.
        say: prints a line.
    """
    launch, node = attempt.config.launch, attempt.node
    with no_survivors():
        runner = Runner(
            attempt.run_dir,
            attempt.logs,
            module=attempt.module,
            node=node,
            endpoint=attempt.endpoint,
            threads=launch.threads_per_rank or max(1, available_cores() // node.ranks),
            backend=attempt.config.parallel.backend,
        )
        try:
            return _supervise(runner, signals, others, say, launch.stop_deadline_seconds)
        finally:
            runner.kill()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; False: it did not come true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return met


def _supervise(
    runner: Runner,
    signals: StopSignals,
    others: Others,
    say: Callable[[str], None],
    deadline_seconds: float,
) -> Verdict:
    """Wait for all ranks to leave, or for a reason to end them."""
    deadline = None
    while runner.is_running():
        ranks = runner.ranks()
        if any(rank.failed() for rank in ranks) or others.failed():
            _end_victims(runner)
            break
        if signals.at_once:
            return failed("killed at the second Ctrl-C, without saving")
        if signals.requested:
            others.ask_to_stop(signals.requested)
        requested = signals.requested or others.stop_requested()
        if deadline is None and (requested or any(rank.stopped() for rank in ranks)):
            say(f"{requested or 'stop'}: saving a checkpoint; Ctrl-C again kills")
            deadline = time.monotonic() + deadline_seconds
        if deadline is not None:
            for rank in ranks:
                rank.ask_to_stop()
            if time.monotonic() > deadline:
                return _too_late(runner, deadline_seconds)
        time.sleep(POLL_SECONDS)
    return _verdict(runner, signals, others)


def _end_victims(runner: Runner) -> None:
    """Give the other ranks a moment to leave by themselves, then let the runner tell."""
    ranks = runner.ranks()
    wait_until(lambda: not any(rank.is_running() for rank in ranks), _VICTIM_SECONDS)
    for rank in ranks:
        rank.kill()
    if ranks:
        wait_until(lambda: not runner.is_running(), _REPORT_SECONDS)


def _verdict(runner: Runner, signals: StopSignals, others: Others) -> Verdict:
    """What the exit codes of all ranks mean."""
    told = runner.tells_exit_codes()
    culprit = first_failure(runner.ranks()) if told else None
    if culprit is not None:
        return _failed_rank(culprit)
    if others.failed():
        return failed("ended because another node failed")
    if not told:
        # A runner that was killed left its peers without their ranks.
        return failed(f"{runner.explain()}\nits log: {runner.log}", order=(False, 0.0, False))
    if any(rank.alarmed() for rank in runner.ranks()):
        reason = "stopped by an alarm (see events.jsonl), checkpoint saved"
        return Verdict(state="stopped", reason=reason, exit_code=ALARM_EXIT_CODE)
    if any(rank.stopped() for rank in runner.ranks()):
        asked = signals.requested or others.stop_requested() or "request to a rank"
        reason = f"stopped on {asked}, checkpoint saved"
        return Verdict(state="stopped", reason=reason, exit_code=STOPPED_EXIT_CODE)
    return Verdict(state="done", reason="all steps done", exit_code=0)


def _failed_rank(culprit: Rank) -> Verdict:
    return Verdict(
        state="failed",
        reason=f"{culprit.explain()}\nits log: {culprit.log}",
        exit_code=1,
        rank=culprit.number,
        order=order_of_failure(culprit),
        wrong_input=culprit.found_wrong_input,
    )


def _too_late(runner: Runner, deadline_seconds: float) -> Verdict:
    late = [rank for rank in runner.ranks() if rank.is_running()]
    who = f"rank {', '.join(str(rank.number) for rank in late)}" if late else "the runner"
    return failed(
        f"{who} had not saved and left {deadline_seconds:g} s after the stop request and was "
        "killed; raise launch.stop_deadline_seconds if a checkpoint takes longer\n"
        f"its log: {late[0].log if late else runner.log}",
        order=(False, 0.0, False),
    )


def failed(reason: str, *, order: FailureOrder = _LAST) -> Verdict:
    """A failure of no rank in particular."""
    return Verdict(state="failed", reason=reason, exit_code=1, order=order)
