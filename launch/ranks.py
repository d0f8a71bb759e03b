"""The rank processes of this node: start, ask to stop, kill, and tell why one failed.

`launch.local` drives these. A rank gets the environment that torchrun would give it, and
`torchrun -m train.run RUN_DIR` starts the same ranks: a test compares the two runs bit by bit.
Ours are plain subprocesses: torch's elastic agent takes an exit with 85 for a failure and ends the
other ranks with a deadline of its own, writes stdout and stderr to two logs, hides the processes
whose signals and memory the launcher looks at, and costs an import of torch.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.lifetime import LAUNCHER_PID

_LOG_TAIL_LINES = 5

_ALLOCATOR = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=8589934592",
        "glibc.malloc.top_pad=67108864",
    ]
)
"""Keeps freed host memory in the process. By default glibc returns large blocks to the kernel after
each use, and faulting them in again costs a CPU run a tenth of its speed and more."""


class Rank:
    """One process with its log, in a process group of its own."""

    def __init__(
        self, number: int, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.number = number
        self.log = log
        self.error_file = log.with_suffix(".error.json")
        self.exit_code: int | None = None
        """None while it runs; negative: the signal that killed it."""
        self.asked_to_stop = False
        environment = environment | {"TORCHELASTIC_ERROR_FILE": str(self.error_file)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
            )

    def poll(self) -> int | None:
        """The exit code, None while it runs. What the rank left behind in its group is killed."""
        if self.exit_code is None:
            # Looked at without reaping: until then nobody else can get its process group's number.
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self._process.pid, options) is not None:
                self._kill_group()
                self.exit_code = self._process.wait()
        return self.exit_code

    def ask_to_stop(self) -> None:
        """Send SIGUSR1, once, as soon as the rank listens: earlier it would just die of it."""
        if self.exit_code is None and not self.asked_to_stop and self._listens():
            self._process.send_signal(signal.SIGUSR1)
            self.asked_to_stop = True

    def kill(self) -> None:
        """Kill the rank and its children, and wait until it is gone."""
        if self.exit_code is None:
            self._kill_group()
            self.exit_code = self._process.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _listens(self) -> bool:
        """Whether the rank has a handler for SIGUSR1; without /proc it is taken for granted."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return True
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), ":0")
        return bool(int(caught.split(":")[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    @property
    def failed_at(self) -> float:
        """When its exception was recorded, in seconds; infinite if none was."""
        return self.error_file.stat().st_mtime if self.error_file.exists() else float("inf")

    def explain(self) -> str:
        """What happened to a rank that failed."""
        if self.exit_code is not None and self.exit_code < 0:
            return f"rank {self.number} was killed by {_signal_name(-self.exit_code)}"
        if self.error_file.exists():
            return f"rank {self.number} failed: {_recorded_error(self.error_file)}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        tail = [line for line in lines if line.strip()][-_LOG_TAIL_LINES:]
        said = "\n  ".join([f"exit code {self.exit_code}", *tail])
        return f"rank {self.number} failed: {said}"


def start_ranks(
    count: int, command: list[str], logs: Path, *, run_id: str, port: int, threads: int
) -> list[Rank]:
    """Start `count` ranks of one node. Their number is local and global alike.

    Args:
        count: number of ranks.
        command: what each rank runs.
        logs: folder for `rank-R.log`.
        run_id: name of this attempt.
        port: where rank 0 opens its store.
        threads: OMP_NUM_THREADS of a rank.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")
    }
    common = (
        {"GLIBC_TUNABLES": _ALLOCATOR}
        | inherited
        | {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": run_id,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONSAFEPATH": "1",  # a `train.py` in the user's directory must not shadow ours
            LAUNCHER_PID: str(os.getpid()),
        }
    )
    ranks: list[Rank] = []
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            ranks.append(Rank(number, command, common | own, logs / f"rank-{number}.log"))
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    return ranks


def first_failure(ranks: list[Rank], healthy_codes: tuple[int, ...]) -> Rank:
    """The rank that failed by itself; the others fail because they lose a peer.

    A signal from outside leaves no record and its victims' records come later, so it goes first;
    then the earliest recorded exception, even if that rank took longer to exit than its victims.
    """
    failed = [rank for rank in ranks if rank.exit_code not in (None, *healthy_codes)]
    return min(failed, key=lambda rank: ((rank.exit_code or 0) > 0, rank.failed_at))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port on 127.0.0.1 that nobody else is given until rank 0 listens on it.

    The socket stays bound but never listens: the system hands the port to nobody who asks for any
    port, while a store that asks for this one by number may bind it, since both allow reuse.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


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
