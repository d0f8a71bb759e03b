"""Checks of what happens when a rank is late or gone: the others must not wait for ever.

Whether a rank learns it by an exception or is ended by the collectives library is all the same to
the launcher, which ends and restarts all ranks. Hanging is what must not happen.
"""

import os
import time

import torch

from parallel.backend.conformance.checks import DeviationError, Ranks
from parallel.collectives import sum_over

LEAVER_EXIT_CODE = 17
"""Of the rank whose part it is to die, so that nothing else is taken for it."""
_SLACK_SECONDS = 1.0


def late_rank(ranks: Ranks) -> None:
    """The last rank does not come to a sum: the others fail after the timeout, and not long before."""
    if ranks.size == 1:
        return
    _meet(ranks)
    limit = 1.5 * ranks.timeout_seconds + _SLACK_SECONDS
    if ranks.rank == ranks.size - 1:
        time.sleep(limit)
        return
    seconds = _seconds_to_failure(ranks)
    # A rank may also be told by another one that has given up already.
    if not 0.5 * ranks.timeout_seconds < seconds < limit:
        raise DeviationError(
            f"a sum without the last rank failed after {seconds:.1f} s, with a timeout of "
            f"{ranks.timeout_seconds:g} s"
        )


def dead_rank(ranks: Ranks) -> None:
    """The last rank is killed: the others fail within the timeout."""
    if ranks.size == 1:
        return
    _meet(ranks)
    if ranks.rank == ranks.size - 1:
        os._exit(LEAVER_EXIT_CODE)
    seconds = _seconds_to_failure(ranks)
    if seconds > ranks.timeout_seconds + _SLACK_SECONDS:
        raise DeviationError(
            f"the loss of a rank was noticed after {seconds:.1f} s, with a timeout of "
            f"{ranks.timeout_seconds:g} s"
        )


def _meet(ranks: Ranks) -> None:
    """Use the group once: libraries connect when they are used first."""
    sum_over(torch.ones(1, device=ranks.device))
    ranks.backend.synchronize()


def _seconds_to_failure(ranks: Ranks) -> float:
    started = time.monotonic()
    try:
        sum_over(torch.ones(1, device=ranks.device))
        ranks.backend.synchronize()
    except RuntimeError:
        return time.monotonic() - started
    raise DeviationError("a sum succeeded without the last rank")
