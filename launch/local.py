"""Run a run from start to verdict, attempt after attempt, and say so in its directory.

`launch.start` calls `run_ranks` for a run on this machine, `launch.node` calls `lead` on node 0 of
several. After a crash all ranks are started again, in a new attempt with a new rendezvous, from the
newest checkpoint: `launch.restarts` says when that makes sense.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launch.attempt import (
    POLL_SECONDS,
    Attempt,
    StopSignals,
    Verdict,
    failed,
    run_attempt,
    wait_until,
)
from launch.crew import LOST_EXIT_CODE, Crew
from launch.host import reserved_port
from launch.progress import ProgressLine
from launch.ranks import Node
from launch.restarts import Restart, Restarts
from launch.run_dir import held, next_attempt, write_status
from launch.validate import world_size
from train.config import RunConfig
from train.events import append_event
from train.lifetime import LAUNCHER_PID, die_with_parent
from train.stop import STOPPED_EXIT_CODE, WRONG_INPUT_EXIT_CODE


def run_ranks(run_dir: Path, config: RunConfig, *, module: str = "train.run") -> int:
    """Run every rank of `run_dir` to its end; must be called from the main thread.

    Writes `status.json`, the logs and an event for every restart, shows progress, and prints why a
    run failed.

    Args:
        run_dir: holds the `recipe.yaml` that the ranks read.
        config: the same recipe.
        module: what a rank runs, as `python -m MODULE RUN_DIR`.

    Returns:
        0 done, 85 stopped on request after saving, 86 the same for an alarm, 2 the ranks cannot use
        what the user gave, 1 failed.

    Raises:
        RunDirError: another launcher is at work in `run_dir`.
    """
    if LAUNCHER_PID in os.environ:
        die_with_parent()  # a study started us
    with held(run_dir), StopSignals() as signals, Crew(Node(ranks=world_size(config))) as crew:
        run = Run(run_dir=run_dir, config=config, module=module, crew=crew, signals=signals)
        return lead(run).exit_code


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that this process leads, being node 0; `run_dir` is held."""

    run_dir: Path
    config: RunConfig
    """The recipe that lies in `run_dir`."""
    module: str
    """What a rank runs, as `python -m MODULE RUN_DIR`."""
    crew: Crew
    signals: StopSignals

    @property
    def num_ranks(self) -> int:
        """On all nodes."""
        return self.crew.node.ranks * self.crew.node.count

    def stop_requested(self) -> str | None:
        """Name of the signal that any node was sent."""
        return self.signals.requested or self.crew.stop_requested()

    def write_status(self, state: str, reason: str) -> None:
        """Replace `status.json`."""
        write_status(self.run_dir, state=state, reason=reason, ranks=self.num_ranks)


def lead(run: Run, *, interrupted_code: int = 1) -> Verdict:
    """Attempt after attempt on all nodes, until one ends in a way that another would not change.

    Args:
        run: what to run.
        interrupted_code: exit code if it was asked to stop and failed to save.
    """
    restarts = Restarts(run.run_dir, run.config.launch.max_restarts_without_progress)
    while True:
        restarts.begin()
        verdict = _assemble(run) or _attempt(run, restarts.newest_step)
        if verdict.state == "failed" and run.stop_requested():
            verdict = replace(verdict, exit_code=interrupted_code)
        elif verdict.state == "failed" and verdict.exit_code != LOST_EXIT_CODE:
            if restart := restarts.after(verdict):
                _announce(run, verdict, restart)
                wait_until(lambda: run.stop_requested() is not None, restart.pause_seconds)
                continue
            verdict = _final(verdict, restarts)
        break
    run.write_status(verdict.state, verdict.reason)
    run.crew.dismiss(verdict.exit_code)
    if verdict.state == "failed":
        print(verdict.reason, file=sys.stderr)
    return verdict


def _assemble(run: Run) -> Verdict | None:
    """Wait until all nodes are there; a verdict: there will be no attempt."""
    seconds = run.config.launch.join_deadline_seconds
    deadline = time.monotonic() + seconds
    waiting: list[int] = []
    while run.stop_requested() is None:
        missing = run.crew.missing()
        if not missing:
            return None
        nodes = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if time.monotonic() > deadline:
            late = f"{nodes} did not come within {seconds:g} s (launch.join_deadline_seconds)"
            return replace(failed(late), exit_code=LOST_EXIT_CODE)
        if missing != waiting:
            print(f"waiting for {nodes} ...", flush=True)
            run.write_status("running", f"waiting for {nodes}")
            waiting = missing
        time.sleep(POLL_SECONDS)
    reason = f"stopped on {run.stop_requested()} before an attempt; there was nothing to save"
    return Verdict(state="stopped", reason=reason, exit_code=STOPPED_EXIT_CODE)


def _attempt(run: Run, first_step: int) -> Verdict:
    """Run one attempt on all nodes, with a new number and a new port."""
    run_dir, node, number = run.run_dir, run.crew.node, next_attempt(run.run_dir)
    steps = run.config.train.steps
    line = ProgressLine(run_dir, steps=steps, first_step=first_step, ranks=run.num_ranks)
    with reserved_port("" if node.count > 1 else "127.0.0.1") as port:
        attempt = Attempt(
            run_dir=run_dir,
            config=run.config,
            module=run.module,
            number=number,
            node=node,
            endpoint=f"{run.crew.host}:{port}",
        )
        attempt.logs.mkdir(parents=True)
        run.write_status("running", f"attempt {number}")
        with line:
            run.crew.begin(number, port)
            own = run_attempt(attempt, run.signals, run.crew, line.say)
            return run.crew.combine(own, run.signals)


def _announce(run: Run, verdict: Verdict, restart: Restart) -> None:
    """Say on the console and in `events.jsonl` why and from where the run starts again."""
    limit = run.config.launch.max_restarts_without_progress
    after = f"from step {restart.after_step}" if restart.after_step else "from the beginning"
    what = f"restart {restart.count} of {limit} without a new checkpoint, {after}"
    print(f"{verdict.reason}\n{what}, in {restart.pause_seconds:g} s", flush=True)
    append_event(
        run.run_dir,
        step=restart.after_step,
        rank=verdict.rank or 0,
        event="restart",
        detail=f"{verdict.reason.splitlines()[0]}; {what}",
    )


def _final(verdict: Verdict, restarts: Restarts) -> Verdict:
    """The verdict on a run that is not started again."""
    if restarts.refused_input:
        return replace(verdict, exit_code=WRONG_INPUT_EXIT_CODE)
    if restarts.limit:
        times = f"{restarts.limit} restart{'s' if restarts.limit > 1 else ''}"
        spent = f"gave up after {times} in a row without a new checkpoint"
        return replace(verdict, reason=f"{verdict.reason}\n{spent}")
    return verdict
