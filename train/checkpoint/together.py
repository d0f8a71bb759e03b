"""Steps of a save that all ranks make, and that fail on all of them alike."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint was not saved; says which ranks failed, and why."""


def together(
    group: dist.ProcessGroup,
    own: Callable[[], T],
    then: Callable[[list[T]], None] = lambda found: None,
) -> None:
    """Do something on every rank, and, when all have, the rest on rank 0.

    Communication: a gather to rank 0 and a broadcast from it, of what `own` returns and of a text.

    Args:
        group: of the ranks; of all ranks of the world.
        own: called on each.
        then: called on rank 0 with what the ranks returned, in their order.

    Raises:
        SaveError: something failed on some rank; on all ranks alike.
    """
    answer: tuple[T | None, str] = (None, "")
    try:
        answer = (own(), "")
    except Exception as error:  # all ranks raise it
        answer = (None, describe(error))
    first = dist.get_rank(group) == 0
    answers: list[tuple[T | None, str] | None] = [None] * (
        dist.get_world_size(group) if first else 0
    )
    dist.gather_object(answer, answers if first else None, dst=0, group=group)
    verdict = [_verdict(cast("list[tuple[T, str]]", answers), then) if first else ""]
    dist.broadcast_object_list(verdict, src=0, group=group)
    if verdict[0]:
        raise SaveError(verdict[0])


def describe(error: BaseException) -> str:
    """An exception in a line; of DCP, that of each rank that failed."""
    if isinstance(error, CheckpointException):
        return "\n".join(f"rank {rank}: {describe(e)}" for rank, (e, _) in error.failures.items())
    return str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"


def _verdict(answers: list[tuple[T, str]], then: Callable[[list[T]], None]) -> str:
    problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(answers) if problem]
    if not problems:
        try:
            then([value for value, _ in answers])
        except Exception as error:  # all ranks raise it
            problems = [f"rank 0: {describe(error)}"]
    return "\n".join(problems)
