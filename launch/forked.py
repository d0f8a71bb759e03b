"""Ranks on the host's processors: forked from a process that has imported what they need.

Four ranks on two cores would import torch four times, at half the speed. Only `launch.elastic` uses
this, and only where no accelerator is: what a driver sets up does not survive a fork.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

_POLL_SECONDS = 0.05
_FIRST_OWN_FILE = 3
"""After stdin, stdout and stderr."""


@contextmanager
def ranks_are_forked() -> Iterator[None]:
    """In here, torch's launcher forks what it would start as `... -m MODULE ARGUMENTS`."""
    with patch.object(api, "get_subprocess_handler", _ForkedRank):
        yield


class _ForkedRank(SubprocessHandler):
    """What torch's launcher knows of a rank."""

    def _popen(self, args: Sequence[str], env: Mapping[str, str]) -> "_Process":  # type: ignore[override]
        module, *arguments = args[args.index("-m") + 1 :]
        assert self._stdout is not None
        log = self._stdout.fileno()
        return _Process(lambda: _become_rank(module, arguments, env, log))


class _Process:
    """A fork of this process; as much of `subprocess.Popen` as torch's launcher uses."""

    def __init__(self, body: Callable[[], int]) -> None:
        """Start it; returns when it leads a session of its own.

        Args:
            body: what it does; returns its exit code.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(writing)
                code = body()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        os.read(reading, 1)  # the end of the pipe
        os.close(reading)
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode

    def wait(self, timeout: float) -> int:
        """The same, when it has ended.

        Raises:
            TimeoutExpired: it has not, after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_POLL_SECONDS)
        return code


def _become_rank(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], log: int
) -> int:
    """Run a module as a new interpreter would run it: `python -m MODULE ARGUMENTS`."""
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.closerange(_FIRST_OWN_FILE, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # torch's launcher handles them
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaves:
        if not isinstance(leaves.code, int | None):
            raise
        return leaves.code or 0
    return 0
