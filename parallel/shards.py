"""What part of a parameter each rank holds: the arithmetic of DTensor placements as FSDP2 makes them.

`initialize` fills a rank's own part with it; `owners` knows by it where all parts of a matrix are.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor


def held_part(parameter: Tensor) -> tuple[range, ...]:
    """Indices of each dim of the whole parameter that this rank holds.

    Args:
        parameter: a plain tensor, or a DTensor whose every placement shards a dim or replicates.
    """
    if not isinstance(parameter, DTensor):
        return tuple(range(size) for size in parameter.shape)
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    return part_at(coordinate, parameter.shape, mesh.shape, cut_dims(parameter))


def part_at(
    place: Sequence[int], shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[int | None]
) -> tuple[range, ...]:
    """Indices of each dim of the whole parameter that the rank at a place of the mesh holds.

    A parameter is cut by the innermost mesh axis first and FSDP's axis, the outermost, last; each
    cut is that of `torch.chunk`, so late ranks may get fewer indices or none.

    Args:
        place: coordinate on each axis.
        shape: of the parameter.
        mesh: size of each axis.
        cuts: dim that each axis cuts; None if its ranks hold the same.
    """
    held = [range(size) for size in shape]
    for axis in reversed(range(len(mesh))):
        if (dim := cuts[axis]) is not None:
            size = math.ceil(len(held[dim]) / mesh[axis])
            held[dim] = held[dim][place[axis] * size : (place[axis] + 1) * size]
    return tuple(held)


def cut_dims(parameter: DTensor) -> tuple[int | None, ...]:
    """The dim that each axis of the mesh cuts; None where its ranks hold the same."""
    dims: list[int | None] = []
    for placement in parameter.placements:
        # FSDP's placement next to another one is a private class that also has `dim`.
        dim = None if placement.is_replicate() else getattr(placement, "dim", None)
        assert placement.is_replicate() or isinstance(dim, int), f"{placement} is not a sharding"
        dims.append(dim)
    return tuple(dims)
