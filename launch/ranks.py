"""The processes of a run on this node, as the launcher sees them: the runner and its ranks.

`launch.local` drives these. The runner starts the ranks through torch's launcher, in the
environment of torchrun; `torchrun -m train.run RUN_DIR` starts the same ranks, and a test compares
the two runs bit by bit. Watching, asking and killing is done from here, by process id: torch's
launcher would pass a signal on only to end all ranks at once, and after a failure it gives the
others 30 s. What the runner and the ranks have to tell lies in files beside the logs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from train.lifetime import ALLOCATOR, LAUNCHER_PID
from train.stop import (
    ALARM_EXIT_CODE,
    SAVED_EXIT_CODES,
    WRONG_INPUT_EXIT_CODE,
    held_until_installed,
)

_HEALTHY_CODES = (0, *SAVED_EXIT_CODES)
_LOG_TAIL_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node's share of a run: ranks `number * ranks` and those after it."""

    number: int = 0
    """From 0; node 0 decides for all."""
    count: int = 1
    """Nodes of the run."""
    ranks: int
    """Ranks on each node."""


@dataclass(frozen=True)
class RunnerFiles:
    """What the runner of a node leaves in the logs of an attempt."""

    logs: Path
    node: int

    @property
    def log(self) -> Path:
        """What it printed, stdout and stderr."""
        return self.logs / f"runner-{self.node}.log"

    @property
    def pids(self) -> Path:
        """Written once it has started its ranks: {rank: process id}."""
        return self.logs / f"pids-{self.node}.json"

    @property
    def exit_codes(self) -> Path:
        """Written when all its ranks are gone: {rank: exit code}; negative: a signal."""
        return self.logs / f"exit-codes-{self.node}.json"


@dataclass(frozen=True)
class RankFiles:
    """What a rank leaves in the logs of an attempt."""

    logs: Path
    rank: int

    @property
    def log(self) -> Path:
        """What it printed, stdout and stderr."""
        return self.logs / f"rank-{self.rank}.log"

    @property
    def error(self) -> Path:
        """The exception that torch's `record` wrote."""
        return self.logs / f"rank-{self.rank}.error.json"

    @property
    def exit_code(self) -> Path:
        """Where it leaves its exit code (`train.lifetime.leave`)."""
        return self.logs / f"rank-{self.rank}.exit-code"

    def told_exit_code(self) -> int | None:
        """The exit code that it left there; None if it had no time for that."""
        try:
            text = self.exit_code.read_text(encoding="ascii")
        except FileNotFoundError:
            return None
        return int(text) if text else None


class Rank:
    """One rank process; it is the runner's child, not ours."""

    def __init__(self, pid: int, files: RankFiles) -> None:
        self.number = files.rank
        self.log = files.log
        self.exit_code: int | None = None
        """As torch's launcher saw it, None until the runner has told; negative: a signal."""
        self.asked_to_stop = False
        self.killed = False
        """By us, so that its end explains nothing."""
        self._files = files
        self._process: psutil.Process | None = None
        """None once it is gone."""
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)

    def is_running(self) -> bool:
        """Whether it has not left yet."""
        if self._process is not None:
            try:
                gone = self._process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                gone = True
            if gone:
                self._process = None
        return self._process is not None

    def stopped(self) -> bool:
        """Whether it has saved and left on request."""
        return not self.is_running() and self._files.told_exit_code() in SAVED_EXIT_CODES

    def alarmed(self) -> bool:
        """Whether it has saved and left for an alarm."""
        return not self.is_running() and self._files.told_exit_code() == ALARM_EXIT_CODE

    def failed(self) -> bool:
        """Whether it has left in another way than done or stopped."""
        return not self.is_running() and self._files.told_exit_code() not in _HEALTHY_CODES

    def ask_to_stop(self) -> None:
        """Send SIGUSR1, once. A rank that does not listen yet gets it when it does."""
        if self._process is not None and not self.asked_to_stop:
            with suppress(psutil.NoSuchProcess):
                self._process.send_signal(signal.SIGUSR1)
            self.asked_to_stop = True

    def kill(self) -> None:
        """Kill it if it runs."""
        if self._process is not None and self.is_running():
            self.killed = True
            with suppress(psutil.NoSuchProcess):
                self._process.kill()

    @property
    def failed_at(self) -> float:
        """When its exception was recorded, in seconds; infinite if none was."""
        path = self._files.error
        return path.stat().st_mtime if path.exists() else float("inf")

    @property
    def found_wrong_input(self) -> bool:
        """Whether it left because what the user gave cannot be used (`train.run`)."""
        return self._files.told_exit_code() == WRONG_INPUT_EXIT_CODE

    def explain(self) -> str:
        """What happened to a rank that failed."""
        if self._files.error.exists():
            return f"rank {self.number} failed: {_recorded_error(self._files.error)}"
        if self.exit_code is not None and self.exit_code < 0:
            return f"rank {self.number} was killed by {_signal_name(-self.exit_code)}"
        said = "\n  ".join([f"exit code {self.exit_code}", *_last_lines(self.log)])
        return f"rank {self.number} failed: {said}"


class Runner:
    """The process that starts the ranks of this node: `launch.runner`."""

    def __init__(
        self,
        run_dir: Path,
        logs: Path,
        *,
        module: str,
        node: Node,
        endpoint: str,
        threads: int,
        backend: str,
    ) -> None:
        """Start it.

        Args:
            run_dir: the run.
            logs: folder of this attempt.
            module: what a rank runs, as `python -m MODULE RUN_DIR`.
            node: which ranks.
            endpoint: HOST:PORT where the ranks of all nodes meet, on node 0.
            threads: OMP_NUM_THREADS of a rank.
            backend: `parallel.backend` of the recipe.
        """
        self._logs = logs
        self._files = RunnerFiles(logs, node.number)
        self.log = self._files.log
        self._ranks: list[Rank] = []
        command = [sys.executable, "-m", "launch.runner", str(run_dir), f"--logs={logs}"]
        command += [f"--module={module}", f"--endpoint={endpoint}", f"--ranks={node.ranks}"]
        command += [f"--node={node.number}", f"--nodes={node.count}"]
        command += [f"--backend={backend}"]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TORCHELASTIC_")
        }
        own = {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONSAFEPATH": "1",  # a `train.py` in the user's directory must not shadow ours
            LAUNCHER_PID: str(os.getpid()),
            # read when a process starts, which a forked rank does not
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ALLOCATOR),
        }
        with self.log.open("wb") as output, held_until_installed():
            self._process = subprocess.Popen(
                command,
                env=inherited | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
            )

    def is_running(self) -> bool:
        """Whether it has not left yet, which it does after its ranks."""
        return self._process.poll() is None

    def ranks(self) -> list[Rank]:
        """Its ranks; none until it has started all of them."""
        if not self._ranks:
            self._ranks = [
                Rank(pid, RankFiles(self._logs, number))
                for number, pid in _numbers(self._files.pids).items()
            ]
        return self._ranks

    def tells_exit_codes(self) -> bool:
        """Take over what torch's launcher saw of the ranks; False if the runner did not tell."""
        codes = _numbers(self._files.exit_codes)
        for rank in self.ranks():
            rank.exit_code = codes.get(rank.number)
        return bool(codes)

    def kill(self) -> None:
        """Kill it and wait until it is gone; its ranks die with it."""
        self._process.kill()
        self._process.wait()

    def explain(self) -> str:
        """What happened to a runner that did not tell how its ranks ended."""
        code = self._process.poll()
        if code is not None and code < 0:
            return f"the runner of the ranks was killed by {_signal_name(-code)}"
        how = "it hangs" if code is None else f"exit code {code}"
        return "\n  ".join([f"the runner of the ranks failed: {how}", *_last_lines(self.log)])


FailureOrder = tuple[bool, float, bool]
"""The smaller one happened earlier, or explains the larger one."""


def first_failure(ranks: Sequence[Rank]) -> Rank | None:
    """The rank that failed by itself; the others fail because they lose a peer.

    A signal from outside leaves no record and its victims' records come later, so it goes first;
    then the earliest recorded exception, even if that rank took longer to exit than its victims.
    SIGTERM counts for little: torch's launcher sends it to all others, and a rank that is just
    about to exit dies of it.
    """
    failed = [rank for rank in ranks if rank.failed() and not rank.killed]
    return min(failed, key=order_of_failure, default=None)


def order_of_failure(rank: Rank) -> FailureOrder:
    """By which `first_failure` chooses; node 0 compares the nodes' first failures by it, too."""
    ended = rank.exit_code == -signal.SIGTERM
    from_outside = (rank.exit_code or 0) < 0 and not ended and rank.failed_at == float("inf")
    return not from_outside, rank.failed_at, ended


def _numbers(path: Path) -> dict[int, int]:
    """What the runner wrote into a file; empty if there is none yet."""
    try:
        found: dict[str, int] = json.loads(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return {}
    return {int(rank): number for rank, number in found.items()}


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if line.strip()][-_LOG_TAIL_LINES:]


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    hint = " (out of memory? the kernel kills the largest process)" if name == "SIGKILL" else ""
    return name + hint


def _recorded_error(path: Path) -> str:
    """The exception that torch's `record` wrote, and the line of code that raised it."""
    try:
        message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["message"]
        trace = str(message["extraInfo"]["py_callstack"])
        text = str(message["message"])
    except (ValueError, KeyError, TypeError):
        return f"see {path}"
    frames = [line.strip() for line in trace.split("\n") if line.startswith('  File "')]
    return "\n  ".join([text, *frames[-1:]])
