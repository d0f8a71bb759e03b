"""What the memory does and what its tables cost."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from parallel.engram_service import ServiceStats
from train.metrics import Record
from train.model.engram import Engram

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


def engram_sums(
    engrams: Iterable[Engram], stats: ServiceStats | None, like: Float[Tensor, "_"]
) -> Float[Tensor, "sums"]:
    """This rank's summands of the metrics of a step: they travel with the losses.

    Args:
        engrams: the memories of this rank's stages; the sums of their gates start over.
        stats: what tables in host memory cost this rank; None: it has none there.
        like: of the type and on the device that is wanted.
    """
    gates = sum((engram.take_gates().to(like) for engram in engrams), start=like.new_zeros(2))
    costs = [0.0] * (1 + len(_COSTS))
    if stats is not None:
        costs = [1.0, *(float(getattr(stats, name)) for name in _COSTS)]
    return torch.cat([gates, like.new_tensor(costs)])


def engram_metrics(sums: Float[Tensor, "sums"]) -> Record:
    """Averages of one optimizer step.

    Args:
        sums: of `engram_sums` over all ranks.

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
