"""Start values that do not depend on the layout, written without ever holding a whole parameter.

`train.model.initialize` says what each parameter starts as; `train.build` fills the shards. A normal
value is a pure function of (seed, parameter name, flat index in the whole parameter), so each rank
computes just the rows that it has a part of, and all layouts start from the same model, bit by bit.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.shards import held_part

_PAGE = 4096
"""Values are computed in whole pages of this many: a vectorised function may round the odd
elements at the end of an array differently, and where an array ends depends on the layout."""
_BLOCK = 1 << 22
"""Values that are held at a time (at least one row), in fp64."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """What a parameter starts as; made by one of the class methods."""

    kind: Literal["normal", "constant", "explicit"]
    value: float = 0.0
    """Standard deviation, or the constant."""
    values: Tensor | None = None
    """The explicit values."""

    @classmethod
    def normal(cls, std: float) -> "Init":
        """Normal with mean 0 and standard deviation `std`."""
        return cls(kind="normal", value=std)

    @classmethod
    def constant(cls, value: float) -> "Init":
        """The same value everywhere."""
        return cls(kind="constant", value=value)

    @classmethod
    def explicit(cls, values: Tensor) -> "Init":
        """These values, of the shape of the whole parameter: for small ones such as biases."""
        return cls(kind="explicit", values=values)


@torch.no_grad()
def fill_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], inits: Mapping[str, Init], *, seed: int
) -> None:
    """Write the start values into the local part of every parameter, in place.

    Args:
        named_parameters: plain tensors or DTensors, off the meta device.
        inits: what each starts as, by name.
        seed: any non-negative integer.

    Raises:
        ValueError: a parameter has no init, or explicit values of another shape.
    """
    for name, parameter in named_parameters:
        if name not in inits:
            raise ValueError(f"{name}: no start value; add an Init for it")
        init = inits[name]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if init.kind == "constant":
            local.fill_(init.value)
            continue
        held = held_part(parameter)
        assert tuple(map(len, held)) == (*local.shape,), f"{name}: {held}, {local.shape}"
        if init.values is None:
            _fill_normal(local, held, parameter.shape, init.value, (seed, name))
            continue
        if init.values.shape != parameter.shape:
            raise ValueError(
                f"{name}: explicit values have shape {tuple(init.values.shape)}, the parameter "
                f"{tuple(parameter.shape)}; give one value per element"
            )
        local.copy_(init.values[tuple(slice(part.start, part.stop) for part in held)])


def _fill_normal(
    local: Tensor,
    held: tuple[range, ...],
    shape: Sequence[int],
    std: float,
    key: tuple[int, str],
) -> None:
    """Write some rows at a time; of a parameter that is cut along other dims, too, whole ones are made."""
    rows, *inner = held or (range(1),)
    local = local.view(len(rows), *local.shape[1:])
    width = math.prod(shape[1:])
    at_once = max(1, _BLOCK // width)
    for first in range(0, len(rows), at_once):
        block = rows[first : first + at_once]
        values = std * standard_normal(*key, block.start * width, block.stop * width)
        whole = values.view(len(block), *shape[1:])
        piece = whole[(slice(None), *(slice(part.start, part.stop) for part in inner))]
        local[first : first + len(block)] = piece


def standard_normal(seed: int, name: str, start: int, stop: int) -> Float[Tensor, "elements"]:
    """Elements `start` to `stop` of an endless sequence of standard normal values, in fp64.

    Philox (Salmon et al., 2011) keyed by a hash of seed and name gives element i from its 64-bit
    output i: the upper 53 bits become a point of the open unit interval, and the inverse of the
    normal distribution maps it.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = torch.empty(stop - start, dtype=torch.float64)
    for page in range(start // _PAGE, math.ceil(stop / _PAGE) if stop > start else 0):
        # One step of the counter makes four outputs.
        bits = np.random.Philox(key=key, counter=page * _PAGE // 4).random_raw(_PAGE)
        uniform = torch.from_numpy(((bits >> np.uint64(11)) + 0.5) * 2.0**-53)
        normal = torch.erfinv(2.0 * uniform - 1.0) * math.sqrt(2.0)
        first, last = max(start, page * _PAGE), min(stop, (page + 1) * _PAGE)
        values[first - start : last - start] = normal[first - page * _PAGE : last - page * _PAGE]
    return values
