"""Which monitors there are: every module of this package with a `build_monitor`.

`train.step` asks all of them; what they sum over ranks travels with the losses. To add one, add a
file; nothing else changes.
"""

import pkgutil
from collections.abc import Sequence
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

import train.monitor
from train.metrics import Monitor, Record
from train.training import Training


def build_monitors(training: Training) -> list[Monitor]:
    """Those that have something to watch in this training, in the order of their names."""
    found = []
    for module in sorted(info.name for info in pkgutil.iter_modules(train.monitor.__path__)):
        build = getattr(import_module(f"train.monitor.{module}"), "build_monitor", None)
        if build is not None and (monitor := build(training)) is not None:
            found.append(monitor)
    return found


def sum_with(
    monitors: Sequence[Monitor], sums: Float[Tensor, "own"]
) -> tuple[Float[Tensor, "all"], list[int]]:
    """`sums` and behind them those of the monitors, with the length of each part."""
    parts = [sums, *(monitor.sums(sums) for monitor in monitors)]
    return torch.cat(parts), [len(part) for part in parts]


def records(monitors: Sequence[Monitor], parts: Sequence[Tensor]) -> Record:
    """Metrics of all monitors, given the part of each."""
    record: Record = {}
    for monitor, part in zip(monitors, parts, strict=True):
        record |= monitor.record(part)
    return record
