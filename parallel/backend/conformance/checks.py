"""A check: what it is called, what training needs it for, and how it says what is wrong.

The other files of this folder hold the checks; `suite` lists them. A check is a function that all
ranks of a process group call at the same time, each on its device. It raises if the backend does
something else than the framework relies on, and returns nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.backend.base import Backend


class DeviationError(Exception):
    """A backend does something else than it should."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Those that run a check together, seen by one of them."""

    backend: Backend
    device: torch.device
    """Of this rank."""
    rank: int
    size: int
    timeout_seconds: float
    """After which a collective of the default group fails."""

    def ramp(self, dtype: torch.dtype, length: int = 5) -> Tensor:
        """Small numbers that differ between ranks and places; exact in every type."""
        values = [self.value(self.rank, place) for place in range(length)]
        return torch.tensor(in_type(values, dtype), dtype=dtype, device=self.device)

    def value(self, rank: int, place: int) -> int:
        """What another rank has at a place of its ramp."""
        return (3 * rank + place) % 7 + 1

    def values(self, place: int) -> list[int]:
        """What all ranks have at a place."""
        return [self.value(rank, place) for rank in range(self.size)]

    def noise(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers whose sum depends on the order of its terms, other ones on every rank."""
        generator = torch.Generator().manual_seed(self.rank)
        values = torch.randn(shape, generator=generator)
        return (values * 1000.0 ** torch.randn(shape, generator=generator)).to(self.device, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that a backend must be able to do."""

    name: str
    needed_for: str
    """What does not work without it."""
    fix: str
    """What somebody can do about it."""
    run: Callable[[Ranks], None]
    ends_ranks: bool = False
    """Ranks leave, or lose their process group: they run it alone and end. A rank may even be ended
    by the collectives library, which is how some of them notice."""


def in_type(values: list[int], dtype: torch.dtype) -> list[int] | list[bool]:
    """Numbers as a tensor of a type has them: odd ones are true."""
    return [value % 2 == 1 for value in values] if dtype == torch.bool else values


def expect(found: object, expected: object, what: str) -> None:
    """Compare; tensors with nested lists, by value.

    Raises:
        DeviationError: they differ; says how.
    """
    if isinstance(found, Tensor):
        found = found.tolist()
    if found != expected:
        raise DeviationError(f"{what}: got {found}, not {expected}")


def expect_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare two tensors of one shape bit by bit.

    Raises:
        DeviationError: they differ; says in how many elements.
    """
    differ = int((found != expected).sum())
    if differ or found.dtype != expected.dtype:
        raise DeviationError(f"{what}: {differ} of {found.numel()} numbers differ")


def refuses(call: Callable[[], object]) -> bool:
    """Whether a call is refused by an exception, before it begins."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return True
    return False


def world_group() -> dist.ProcessGroup:
    """The default process group."""
    group = dist.group.WORLD
    assert group is not None, "the ranks have not met"
    return group
