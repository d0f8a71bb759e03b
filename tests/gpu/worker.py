"""A process of its own for a backend, in which tests run functions as the only rank.

Spawned, for a device that was touched before a fork is lost to the child. A device that a failure
left unusable goes with its process; the next test gets a new one.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # the only rank takes any
}


class Worker:
    """Runs functions in a process that it starts when the first one comes."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin `function(backend, *args)`; all must pickle. `result` waits for it."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.backend))
            self._process.start()
            theirs.close()
        self._connection.send((function, args))

    def result(self, timeout: float = 100.0) -> Any:
        """What the function returned.

        Raises:
            AssertionError: what it raised, as text, or that the process died or hangs.
        """
        assert self._connection is not None, "nothing was started"
        error, value = f"no answer in {timeout} s", None
        try:
            if self._connection.poll(timeout):
                error, value = self._connection.recv()
        except EOFError:
            self._process.join()
            error = f"the process died with exit code {self._process.exitcode}"
        if error:
            self.close()
            raise AssertionError(f"{self.backend}:\n{error}")
        return value

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 100.0) -> Any:
        """`start` and `result`."""
        self.start(function, *args)
        return self.result(timeout)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None


def _serve(connection: "Connection[Any, Any]", backend: str) -> None:
    """Answer until the test's end of the pipe is closed: (error or None, value)."""
    os.environ.update(_ENVIRONMENT)
    os.environ.pop("MNEME_BACKEND", None)

    import torch.distributed as dist  # noqa: PLC0415 - after the environment

    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        error, value = None, None
        try:
            value = function(backend, *args)
        except BaseException:  # the test reports it
            error = traceback.format_exc()
        connection.send((error, value))
        if dist.is_initialized():
            dist.destroy_process_group()
