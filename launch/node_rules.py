"""Rules about the nodes of a run. `launch.validate` calls them. No torch."""

import re
from collections.abc import Iterator

from parallel.layout import ParallelLayout
from train.config import RunConfig

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong, each `path=value: rule; what to type instead`."""
    layout = ParallelLayout.from_config(config.parallel)
    nodes, world, tensor = config.launch.nodes, layout.world_size, layout.tensor
    if world % nodes:
        fits = [n for n in range(1, world + 1) if world % n == 0 and world // n % tensor == 0]
        yield (
            f"launch.nodes={nodes}: the ranks, data x data_replicate x tensor x pipeline x context = "
            f"{world}, must divide among the nodes; use launch.nodes={_nearest(nodes, fits)}"
        )
    elif world // nodes % tensor:
        fits = [n for n in range(1, nodes) if world % n == 0 and world // n % tensor == 0]
        yield (
            f"parallel.tensor_parallel_size={tensor}: these ranks must share a node, and "
            f"launch.nodes={nodes} leaves {world // nodes} on each; use "
            f"launch.nodes={_nearest(nodes, fits)}"
        )
    for name in config.cluster.env:
        if not _VARIABLE.fullmatch(name):
            yield f"cluster.env.{name}: no name of an environment variable; use letters, digits and _"


def _nearest(wanted: int, numbers: list[int]) -> int:
    return min(numbers, key=lambda number: abs(number - wanted), default=1)
