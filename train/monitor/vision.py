"""How many images a step has, and what they cost: patches differ from batch to batch."""

from jaxtyping import Float
from torch import Tensor

from data.packing import Batch
from train.metrics import Record
from train.model.flops import vision_flops
from train.training import Training

NUM_SUMS = 2
"""What `VisionMonitor` adds to the sums over ranks."""


def build_monitor(training: Training) -> "VisionMonitor | None":
    """The monitor, if the model takes images."""
    return None if training.config.model.vision is None else VisionMonitor(training)


class VisionMonitor:
    """`vision/patches` and `vision/flops` (forward and backward of the tower) of the global batch."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._grids: list[tuple[int, ...]] = []

    def start(self, step: int, batch: Batch) -> None:
        """Keep the sizes of the images, on one of the ranks that share them."""
        seen = batch.vision if self._training.counts_data else None
        self._grids = [] if seen is None else [tuple(grid) for grid in seen.grids.tolist()]

    def sums(self, like: Float[Tensor, "_"]) -> Float[Tensor, "sums"]:
        """Patches of this rank's images, and the operations on them."""
        model = self._training.config.model
        assert model.vision is not None
        flops = vision_flops(model.vision, model.hidden_size, self._grids)
        return like.new_tensor([sum(t * h * w for t, h, w in self._grids), flops])

    def record(self, sums: Float[Tensor, "sums"]) -> Record:
        """Of all ranks."""
        patches, flops = sums.tolist()
        return {"vision/patches": int(patches), "vision/flops": flops}
