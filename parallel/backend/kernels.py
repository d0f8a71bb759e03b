"""The table of named kernels: what may stand in for a reference implementation, and where.

`train.build` asks for a recipe's kernels before the ranks meet, `parallel.apply` puts them into the
model. A kernel is listed when it has a second implementation that somebody would choose; whoever
adds one adds a line here, its name to `parallel.config`, and a test against the reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from parallel.config import ParallelConfig
from parallel.cross_entropy import CrossEntropy
from parallel.expert import DispatcherKind
from parallel.flash_attention import DenseAttention
from parallel.grouped import GroupedLinear
from parallel.rows import Permute


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One implementation of a kernel, not imported before it is chosen."""

    location: str
    """`module:name`; the module imports at its top whatever it needs."""
    devices: frozenset[str] | None = None
    """torch's names of the devices that it is known to run on; None: all."""
    by_default: bool = True
    """Whether `auto` may choose it: as exact as the reference in every dtype, and tested on one of
    its devices."""


KERNELS: Mapping[str, Mapping[str, Implementation]] = MappingProxyType(
    {
        "expert_dispatcher": {
            "all_to_all": Implementation(location="parallel.expert:AllToAllDispatcher"),
            "deepep": Implementation(
                location="parallel.deepep:DeepEPDispatcher",
                devices=frozenset({"cuda"}),
                by_default=False,
            ),
        },
        "kernels.permute": {
            "reference": Implementation(location="parallel.rows:permute"),
            "megatron": Implementation(location="parallel.megatron_rows:permute", by_default=False),
        },
        "kernels.cross_entropy": {
            "reference": Implementation(location="parallel.cross_entropy:summed_cross_entropy"),
            "megatron": Implementation(
                location="parallel.megatron_cross_entropy:summed_cross_entropy", by_default=False
            ),
            "megatron_fused": Implementation(
                location="parallel.megatron_cross_entropy:fused_cross_entropy", by_default=False
            ),
        },
        "kernels.attention": {
            "flash": Implementation(
                location="parallel.flash_attention:flash_attention", devices=frozenset({"cuda"})
            ),
            "reference": Implementation(location="parallel.flash_attention:REFERENCE"),
        },
        "kernels.grouped_linear": {
            "grouped_mm": Implementation(
                location="parallel.grouped:grouped_mm", devices=frozenset({"cpu", "cuda"})
            ),
            "loop": Implementation(location="parallel.grouped:loop"),
        },
    }
)
"""By the recipe's key below `parallel`, then by its value; the fastest first."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of a recipe on one kind of device."""

    dispatcher: DispatcherKind
    permute: Permute
    grouped_linear: GroupedLinear
    cross_entropy: CrossEntropy
    attention: DenseAttention | None
    """None: the model's own code."""


def choose_kernels(config: ParallelConfig, device_type: str) -> Kernels:
    """Import what a recipe asks for.

    Args:
        config: the recipe's part.
        device_type: torch's name of the device.

    Raises:
        ValueError: an implementation has another name, or does not run on the device.
        RuntimeError: it cannot be imported; says why.
    """
    return Kernels(
        dispatcher=choose("expert_dispatcher", config.expert_dispatcher, device_type),
        permute=choose("kernels.permute", config.kernels.permute, device_type),
        grouped_linear=choose("kernels.grouped_linear", config.kernels.grouped_linear, device_type),
        cross_entropy=choose("kernels.cross_entropy", config.kernels.cross_entropy, device_type),
        attention=choose("kernels.attention", config.kernels.attention, device_type),
    )


def choose(key: str, wanted: str, device_type: str) -> Any:  # noqa: ANN401 - kernels differ
    """The implementation of one kernel; `auto`: the fastest that is exact and runs on the device.

    Args:
        key: of `KERNELS`.
        wanted: the recipe's value.
        device_type: torch's name of the device.

    Raises:
        ValueError: see `choose_kernels`.
        RuntimeError: likewise.
    """
    offered = {
        name: implementation
        for name, implementation in KERNELS[key].items()
        if implementation.devices is None or device_type in implementation.devices
    }
    chosen = wanted
    if wanted == "auto":
        chosen = next(name for name, offer in offered.items() if offer.by_default)
    if chosen not in offered:
        known = KERNELS[key].get(chosen)
        rule = "no such kernel"
        if known is not None and known.devices is not None:
            rule = f"runs on {' and '.join(sorted(known.devices))}, not on {device_type}"
        raise ValueError(f"parallel.{key}={wanted}: {rule}; use {' or '.join(offered)}")
    module, _, name = offered[chosen].location.partition(":")
    try:
        return getattr(import_module(module), name)
    # OSError: a library that the package links to is missing. Others check their surroundings.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        others = [other for other in offered if other != chosen]
        raise RuntimeError(
            f"parallel.{key}={wanted}: `import {module}` fails: {error}; install what is missing, "
            f"or use {' or '.join(others)}"
        ) from error
