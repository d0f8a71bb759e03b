"""What DeepSpeed sends, counted for the axis `dp`: all of it goes through one object, which is watched.

Called by `parallel.deepspeed_engine`. DeepSpeed's functions for collectives call methods of their
backend by these names, with the tensors that travel, and only that calls torch.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch.distributed as dist

from parallel.traffic import count_sent
from parallel.volume import gather_bytes, sum_bytes


def _part_bytes(part: int, ranks: int) -> float:
    """Of a gather or a reduce-scatter by the part that one rank has or gets."""
    return gather_bytes(part * ranks, ranks)


_SENT: dict[str, tuple[str, int, Callable[[int, int], float]]] = {
    "all_reduce": ("tensor", 0, sum_bytes),
    # A mean over the ranks, one of which sends nothing.
    "broadcast": ("tensor", 0, gather_bytes),
    "reduce": ("tensor", 0, gather_bytes),
    "all_gather": ("tensor", 1, _part_bytes),
    "all_gather_into_tensor": ("input_tensor", 1, _part_bytes),
    "reduce_scatter": ("output", 0, _part_bytes),
    "reduce_scatter_tensor": ("output_tensor", 0, _part_bytes),
}
"""Which argument tells the bytes of a call, by its name and its place, and how."""
_GROUP = 2
"""Place of the group, in the one call in which it has no name."""


def count_deepspeed_traffic(deepspeed: ModuleType) -> None:
    """Let DeepSpeed's collectives count from now on, once; after `init_distributed`."""
    backend = deepspeed.comm.comm.cdb
    for name, (argument, place, size) in _SENT.items():
        if name not in vars(backend):
            setattr(backend, name, _counted(getattr(backend, name), argument, place, size))


def _counted(
    call: Callable[..., Any], argument: str, place: int, size: Callable[[int, int], float]
) -> Callable[..., Any]:
    @wraps(call)
    def counted(*args: Any, **keys: Any) -> Any:  # noqa: ANN401 - DeepSpeed's
        tensor = keys[argument] if argument in keys else args[place]
        group = keys["group"] if "group" in keys else args[_GROUP]
        count_sent("dp", size(tensor.nbytes, dist.get_world_size(group)))
        return call(*args, **keys)

    return counted
