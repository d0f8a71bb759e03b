"""How the processes of a run begin and end: quickly, with their exit code told, and none left over.

The launcher (`mneme train`) starts a runner, and the runner starts the ranks. Each of them calls
`die_with_parent` before anything else: a rank that lived on would hold its device and its port, and
write into a run directory that a second launcher may have taken over.
"""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from train.stop import SAVED_EXIT_CODES

LAUNCHER_PID = "MNEME_LAUNCHER_PID"
"""Environment variable by which a process tells those that it starts who their parent is."""
EXIT_CODE_FILE = "MNEME_EXIT_CODE_FILE"
"""Environment variable by which the runner tells a rank where to leave its exit code."""

ALLOCATOR = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=8589934592",
        "glibc.malloc.top_pad=67108864",
    ]
)
"""Keeps freed host memory in the rank. By default glibc returns large blocks to the kernel after
each use, and faulting them in again costs a CPU run a tenth of its speed and more."""

_TORCH_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent() -> None:
    """Have the kernel kill this process with SIGKILL when its parent ends.

    SIGKILL, because nobody is left who could end a rank that hangs while it saves. Linux only; on
    other systems a rank notices its launcher's death by the loss of its peers. The kernel means
    the parent's thread: a parent has to start such children from a thread that outlives them.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call above: then this process was handed to another one.
    parent = os.environ.get(LAUNCHER_PID)
    if sys.platform == "linux" and parent is not None and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans(adopt: bool) -> None:
    """Become the parent of every descendant whose own parent ends, or stop doing so. Linux only.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def leave(code: int) -> NoReturn:
    """End this rank with an exit code, whatever its threads do.

    Threads of a collective library whose peer died must not keep a finished rank alive. Under the
    runner the code also goes into a file, and a rank that stopped leaves with 0: torch's launcher
    takes any other code for a failure and would end the ranks that are still saving.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    told = os.environ.get(EXIT_CODE_FILE)
    if told is not None:
        Path(told).write_text(str(code), encoding="ascii")
    os._exit(0 if told is not None and code in SAVED_EXIT_CODES else code)


def import_torch_alone() -> None:
    """Let `import torch`, here and in children, leave packages of vendors to `parallel.backend`.

    By default torch imports all that are installed, and fails if one of them does: Ascend's without
    CANN's libraries would break even runs on the CPU. A value that the user has set stays.
    """
    os.environ.setdefault(_TORCH_AUTOLOAD, "0")


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import here what is large and stays: the garbage collector leaves it alone, then and later.

    It would go through all the objects of torch again and again while they come to be, which is a
    quarter of the time of the import, and finds nothing.
    """
    import_torch_alone()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
