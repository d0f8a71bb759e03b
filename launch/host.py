"""What the launcher needs of this host: cores, a port, and that no process outlives a run."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from train.lifetime import adopt_orphans


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def reserved_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A TCP port that nobody else is given until rank 0 listens on it; host "": of all addresses.

    The socket stays bound but never listens: the system hands the port to nobody who asks for any
    port, while a store that asks for this one by number may bind it, since both allow reuse.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield int(holder.getsockname()[1])


@contextmanager
def no_survivors() -> Iterator[None]:
    """Kill, at the end, every process that was started in here, and wait until it is gone.

    That includes children of a rank which outlived it: they are handed to this process.
    """
    before = set(psutil.Process().children())
    adopt_orphans(True)
    try:
        yield
    finally:
        # The children of those that are killed are handed to us, too, and are next.
        while survivors := [c for c in psutil.Process().children() if c not in before]:
            for process in survivors:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(survivors)
        adopt_orphans(False)
