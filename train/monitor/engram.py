"""What the memory does and what its tables cost."""

import torch
from jaxtyping import Float
from torch import Tensor

from data.packing import Batch
from train.metrics import Record
from train.training import Training

_COSTS = (
    "fetch_seconds",
    "hidden_seconds",
    "fetch_bytes",
    "gradient_bytes",
    "unique_rows",
    "occurrences",
    "late_rows",
)
NUM_SUMS = 2 + 1 + len(_COSTS)
"""What `EngramMonitor` adds to the sums over ranks."""


def build_monitor(training: Training) -> "EngramMonitor | None":
    """The monitor, if the model has a memory."""
    return None if training.config.model.engram is None else EngramMonitor(training)


class EngramMonitor:
    """Gates and costs of every step."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def start(self, step: int, batch: Batch) -> None:
        """Nothing: the layers count by themselves."""

    def sums(self, like: Float[Tensor, "_"]) -> Float[Tensor, "sums"]:
        """Gates of this rank's memories, which start over, and what their tables cost here."""
        engrams, memory = self._training.model.engram_layers().values(), self._training.memory
        gates = sum((engram.take_gates().to(like) for engram in engrams), start=like.new_zeros(2))
        costs = [0.0] * (1 + len(_COSTS))
        if memory is not None:
            stats = memory.take_stats()
            costs = [1.0, *(float(getattr(stats, name)) for name in _COSTS)]
        return torch.cat([gates, like.new_tensor(costs)])

    def record(self, sums: Float[Tensor, "sums"]) -> Record:
        """See `engram_metrics`."""
        return engram_metrics(sums)


def engram_metrics(sums: Float[Tensor, "sums"]) -> Record:
    """Averages of one optimizer step.

    Args:
        sums: of `EngramMonitor` over all ranks.

    Returns:
        `engram/gate_mean` over tokens, streams and layers. Of tables in host memory also, as means
        over the ranks that hold them, `engram/fetch_seconds` (gathering and exchange of rows),
        `engram/fetch_bytes` (rows received) and `engram/gradient_bytes` (gradients sent); and
        `engram/prefetch_hidden_fraction` (of the fetch, during which no rank waited for it),
        `engram/unique_row_fraction` (distinct rows over rows read, within each rank) and
        `engram/late_row_fraction` (of the distinct rows, changed by the step before, so that they
        could not travel early).
    """
    gates, number, holders, *costs = sums.tolist()
    record: Record = {"engram/gate_mean": gates / max(number, 1.0)}
    if not holders:
        return record
    of = dict(zip(_COSTS, costs, strict=True))
    for name in ("fetch_seconds", "fetch_bytes", "gradient_bytes"):
        record[f"engram/{name}"] = of[name] / holders
    for name, part, whole in (
        ("prefetch_hidden", "hidden_seconds", "fetch_seconds"),
        ("unique_row", "unique_rows", "occurrences"),
        ("late_row", "late_rows", "unique_rows"),
    ):
        record[f"engram/{name}_fraction"] = of[part] / of[whole] if of[whole] else 0.0
    return record
