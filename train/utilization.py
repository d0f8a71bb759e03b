"""How much of the devices' speed the model uses: `model_flops_utilization`. Called by `train.loop`.

    operations of the step (train.model.flops) / (step_seconds * ranks * peak of a device)

Recomputed passes count for nothing, so the figure falls when they cost time. What the optimizer
does is not counted either.
"""

from dataclasses import dataclass, replace

import torch.distributed as dist

from parallel.backend.peak import device_name, known_peak, measured_peak
from train.metrics import Record
from train.model.flops import training_flops
from train.stages import Phase
from train.training import Training


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a device could do."""

    flops: float
    """Operations a second."""
    source: str
    """Where the figure comes from, for a person."""

    def __str__(self) -> str:
        return f"each at most {self.flops:.3g} operations/s ({self.source})"


def find_peak(training: Training) -> Peak:
    """The recipe's figure, the vendor's, or a measurement on this rank; all ranks alike."""
    given, dtype = training.config.monitor.peak_flops_per_device, training.compute_dtype
    if given is not None:
        return Peak(flops=given, source="monitor.peak_flops_per_device")
    name = device_name(training.device)
    if (known := known_peak(name, dtype)) is not None:
        return Peak(flops=known, source=f"{name}, {training.config.train.dtype}")
    measured = measured_peak(training.backend, training.device, dtype)
    return Peak(flops=measured, source=f"measured on {name}, {training.config.train.dtype}")


def utilization(training: Training, phase: Phase, record: Record, peak: Peak) -> float:
    """Share of the peak that a step reached.

    Args:
        training: its model and ranks.
        phase: of the step.
        record: of the step; has `step_seconds`, and the work on images if the model takes them.
        peak: of a device.
    """
    model = training.config.model
    if phase.indexer_stage is not None:
        model = replace(model, indexer=replace(model.indexer, stage=phase.indexer_stage))
    per_token = training_flops(model, phase.sequence_length, frozen=training.model.is_frozen)
    text = phase.tokens_per_step * per_token
    flops = text + record.get("vision/flops", 0.0)
    return flops / (record["step_seconds"] * dist.get_world_size() * peak.flops)
