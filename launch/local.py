"""Run a run from start to verdict, attempt after attempt, and say so in its directory.

`launch.start` calls `run_ranks` for a run on this machine, `launch.node` calls `lead` on node 0 of
several. After a crash all ranks are started again, in a new attempt with a new rendezvous, from the
newest checkpoint: `launch.restarts` says when that makes sense.
"""

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from launch.attempt import POLL_SECONDS, Attempt, StopSignals, Verdict, failed, run_attempt
from launch.crew import Crew
from launch.progress import ProgressLine
from launch.ranks import Node, reserved_port
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
        return lead(run_dir, config, crew, signals, module=module).exit_code


def lead(
    run_dir: Path,
    config: RunConfig,
    crew: Crew,
    signals: StopSignals,
    *,
    module: str,
    interrupted_code: int = 1,
) -> Verdict:
    """Run all nodes, this one being node 0, to the end of the run; `run_dir` is held.

    Args:
        run_dir: holds the `recipe.yaml` that the ranks read.
        config: the same recipe.
        crew: the other nodes.
        signals: stop requests to this process.
        module: what a rank runs.
        interrupted_code: exit code if it was asked to stop and failed to save.
    """
    restarts = Restarts(run_dir, config.launch.max_restarts_without_progress)
    while True:
        restarts.begin()
        verdict = _assemble(run_dir, config, crew, signals)
        if verdict is None:
            verdict = _attempt(run_dir, config, crew, signals, restarts.newest_step, module)
            restart = None
            if verdict.state == "failed" and _is_asked_to_stop(signals, crew):
                verdict = replace(verdict, exit_code=interrupted_code)
            elif verdict.state == "failed" and (restart := restarts.after(verdict)) is None:
                verdict = _final(verdict, restarts)
            if restart is not None:
                _announce(run_dir, verdict, restart, config)
                _wait(restart.pause_seconds, signals, crew)
                continue
        break
    ranks = crew.node.ranks * crew.node.count
    write_status(run_dir, state=verdict.state, reason=verdict.reason, ranks=ranks)
    crew.dismiss(verdict.exit_code)
    if verdict.state == "failed":
        print(verdict.reason, file=sys.stderr)
    return verdict


def _assemble(
    run_dir: Path, config: RunConfig, crew: Crew, signals: StopSignals
) -> Verdict | None:
    """Wait until all nodes are there; a verdict: there will be no attempt."""
    seconds = config.launch.join_deadline_seconds
    deadline = time.monotonic() + seconds
    waiting: list[int] = []
    while not _is_asked_to_stop(signals, crew):
        missing = crew.missing()
        if not missing:
            return None
        nodes = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if time.monotonic() > deadline:
            return replace(
                failed(
                    f"{nodes} did not come within {seconds:g} s; raise launch.join_deadline_seconds "
                    "if they take longer to start"
                ),
                exit_code=LOST_EXIT_CODE,
            )
        if missing != waiting:
            print(f"waiting for {nodes} ...", flush=True)
            ranks = crew.node.ranks * crew.node.count
            write_status(run_dir, state="running", reason=f"waiting for {nodes}", ranks=ranks)
            waiting = missing
        time.sleep(POLL_SECONDS)
    asked = signals.requested or crew.stop_requested()
    reason = f"stopped on {asked} between two attempts; nothing was trained since the last checkpoint"
    return Verdict(state="stopped", reason=reason, exit_code=STOPPED_EXIT_CODE)


def _attempt(
    run_dir: Path,
    config: RunConfig,
    crew: Crew,
    signals: StopSignals,
    first_step: int,
    module: str,
) -> Verdict:
    """Run one attempt on all nodes."""
    node, number = crew.node, next_attempt(run_dir)
    ranks = node.ranks * node.count
    line = ProgressLine(run_dir, steps=config.train.steps, first_step=first_step, ranks=ranks)
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port("" if node.count > 1 else "127.0.0.1"))
        attempt = Attempt(
            run_dir=run_dir,
            config=config,
            module=module,
            number=number,
            node=node,
            endpoint=f"{crew.host}:{port}",
        )
        attempt.logs.mkdir(parents=True)
        write_status(run_dir, state="running", reason=f"attempt {number}", ranks=ranks)
        stack.enter_context(line)
        crew.begin(number, port)
        own = run_attempt(attempt, signals, crew, line.say)
        return crew.combine(own, signals)


def _is_asked_to_stop(signals: StopSignals, crew: Crew) -> bool:
    return signals.requested is not None or crew.stop_requested() is not None


def _announce(run_dir: Path, verdict: Verdict, restart: Restart, config: RunConfig) -> None:
    """Say on the console and in `events.jsonl` why and from where the run starts again."""
    limit = config.launch.max_restarts_without_progress
    after = f"from step {restart.after_step}" if restart.after_step else "from the beginning"
    what = f"restart {restart.count} of {limit} without a new checkpoint, {after}"
    print(f"{verdict.reason}\n{what}, in {restart.pause_seconds:g} s", flush=True)
    append_event(
        run_dir,
        step=restart.after_step,
        rank=verdict.rank or 0,
        event="restart",
        detail=f"{verdict.reason.splitlines()[0]}; {what}",
    )


def _wait(seconds: float, signals: StopSignals, crew: Crew) -> None:
    """Wait, but not any longer after a stop request."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _is_asked_to_stop(signals, crew):
        time.sleep(POLL_SECONDS)


def _final(verdict: Verdict, restarts: Restarts) -> Verdict:
    """The verdict on a run that is not started again."""
    if restarts.refused_input:
        return replace(verdict, exit_code=WRONG_INPUT_EXIT_CODE)
    if restarts.limit:
        spent = f"gave up after {restarts.limit} restarts in a row without a new checkpoint"
        return replace(verdict, reason=f"{verdict.reason}\n{spent}")
    return verdict
