"""A rank never outlives its launcher, not even one that was killed with SIGKILL.

`train.run` calls this before anything else. A rank that lived on would hold its device and its
port, and write into a run directory that a second launcher may have taken over.
"""

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "MNEME_LAUNCHER_PID"
"""Environment variable by which `mneme train` tells its ranks who their parent is."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process with SIGKILL when its parent ends.

    SIGKILL, because nobody is left who could end a rank that hangs while it saves. Linux only; on
    other systems a rank notices its launcher's death by the loss of its peers. The kernel means
    the parent's thread: a launcher has to start ranks from a thread that outlives them.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the call above: then this process was handed to another one.
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
