"""The load of every expert, in a file of its own: `expert_load.jsonl` beside `metrics.jsonl`.

A row holds one number for each expert of each layer, too many for a record that TensorBoard and
wandb get as well. `train.step` keeps the counts, `train.metrics` writes them every few steps, the
dashboard and reports read them. No torch.

    {"step": 40, "layers": 3, "experts": 8, "load": "eJx..."}

`load` is base64 of zlib of little-endian 16-bit numbers, layer after layer: tokens of the expert in
the step over the mean of its layer, in hundredths, so that an even load is 100; at most 655.35.
"""

import base64
import zlib
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

EXPERT_LOAD_FILE = "expert_load.jsonl"
_HUNDREDTHS = 100
_LARGEST = 2**16 - 1


@runtime_checkable
class Counts(Protocol):
    """A matrix of counts on a device."""

    def tolist(self) -> list[list[int]]:
        """As numbers: waits for the device."""


class ExpertLoad:
    """Counts of the latest step, left where they are until somebody wants them."""

    def __init__(self) -> None:
        self._counts: Counts | None = None

    def keep(self, counts: Counts) -> None:
        """Counts [MoE layers, experts] over all ranks."""
        self._counts = counts

    def take(self) -> NDArray[np.float64] | None:
        """Counts of the step, once; None: none were kept, as in a model without experts."""
        counts, self._counts = self._counts, None
        return None if counts is None else np.array(counts.tolist(), dtype=np.float64)


def encode(step: int, counts: NDArray[np.float64]) -> dict[str, int | str]:
    """The row of a step from its counts [layers, experts]."""
    relative = counts / counts.mean(axis=1, keepdims=True).clip(min=1e-12)
    hundredths = (relative * _HUNDREDTHS).round().clip(max=_LARGEST).astype("<u2")
    load = base64.b64encode(zlib.compress(hundredths.tobytes())).decode("ascii")
    layers, experts = counts.shape
    return {"step": step, "layers": layers, "experts": experts, "load": load}


def decode(row: dict[str, Any]) -> NDArray[np.float64]:
    """Load over mean [layers, experts] of a row, within 0.005."""
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(row["load"])), dtype="<u2")
    return numbers.reshape(row["layers"], row["experts"]) / _HUNDREDTHS
