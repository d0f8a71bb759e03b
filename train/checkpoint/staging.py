"""Copies of a rank's state in host memory, so that it can be written while training goes on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Stage:
    """Host memory for one copy of the state, used again by the next save.

    Args:
        pinned: whether the memory is page-locked, so that a device copies to it at full speed.
        synchronize: waits until the device has done what it was given.
    """

    def __init__(self, *, pinned: bool, synchronize: Callable[[], None]) -> None:
        self._pinned, self._synchronize = pinned, synchronize
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Copy every tensor; when this returns, the originals may change.

        The copies are overwritten by the next call.

        Args:
            state: name -> tensor, of which a DTensor's own shard is copied, or a value that never
                changes.
        """
        copies = {
            name: self._room(name, value) for name, value in state.items() if torch.is_tensor(value)
        }
        for name, copy in copies.items():
            _own(copy).copy_(_own(state[name]), non_blocking=True)
        self._synchronize()
        self._copies = copies
        return {**state, **copies}

    def _room(self, name: str, value: Tensor) -> Tensor:
        """The memory of the last copy, if a tensor like this was copied there."""
        last = self._copies.get(name)
        if last is not None and _own(last).shape == _own(value).shape and last.dtype == value.dtype:
            return last
        return torch.empty_like(value.detach(), device="cpu", pin_memory=self._pinned)


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
