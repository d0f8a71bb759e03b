"""Stop requests: a signal sets a flag, and the ranks agree on it between two steps.

`train.run` installs this before it imports anything slow, so that a signal during start-up is not
lost; `train.loop` asks all ranks once a step, so that every rank saves the same step.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED_EXIT_CODE = 85
"""Exit code of a rank, and of the command, that saved and left on request: requeue me."""

ALARM_EXIT_CODE = 86
"""Exit code of a rank, and of the command, that saved and left for an alarm: look before you go on."""
WRONG_INPUT_EXIT_CODE = 2
"""Exit code of a rank, and of the command, for what the user gave: starting again does not help."""
SAVED_EXIT_CODES = (STOPPED_EXIT_CODE, ALARM_EXIT_CODE)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def held_until_installed() -> Iterator[None]:
    """Start a process here, and stop requests to it and its children wait until they listen.

    The kernel keeps a blocked signal pending, also from one program to the next; without this, a
    process that has no handler yet would die of it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Remembers that this rank was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank was asked; others may not have been."""
        return self.signal_name is not None

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1, also those that came before."""
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
