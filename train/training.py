"""What a rank trains with: made by `train.build`, taken by the loop, the step and the monitors."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from data.pictures import VisionGeometry
from data.resume import owned_items
from parallel.backend.base import Backend
from parallel.cross_entropy import CrossEntropy
from parallel.mesh import Meshes
from parallel.pipeline import Pipeline
from train.checkpoint.tables import TableCheckpoint
from train.config import RunConfig
from train.engine import DataEngine
from train.expert_load import ExpertLoad
from train.memory import HostMemory
from train.metrics import Monitor
from train.pictures import vision_geometry
from train.rank_model import RankModel
from train.stages import Phase, phases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""By the name that a recipe uses."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a rank trains with."""

    config: RunConfig
    backend: Backend
    device: torch.device
    meshes: Meshes
    model: RankModel
    pipeline: Pipeline | None
    """What runs the stages of the model; None without pipeline parallelism."""
    engine: DataEngine
    cross_entropy: CrossEntropy
    data_rank: int
    """This rank's index among the ranks that see different sequences."""
    data_size: int
    """Number of ranks that see different sequences."""
    save_group: dist.ProcessGroup
    """All ranks, over gloo, for what saves checkpoints and for nothing else."""
    memory: HostMemory | None = None
    """Engram's tables of this rank's stages in host memory; None: there are none there."""
    tables: TableCheckpoint | None = None
    """What checkpoints hold of Engram beside parameters; None: the model has none."""
    monitors: list[Monitor] = field(default_factory=list)
    """What is watched beside the loss."""
    expert_load: ExpertLoad = field(default_factory=ExpertLoad)
    """Of the latest step."""

    def phase(self, step: int) -> Phase:
        """What batches optimizer step `step` trains on."""
        return next(phase for phase in phases(self.config) if step <= phase.last_step)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of activations and gathered parameters."""
        return DTYPES[self.config.train.dtype]

    @property
    def loss_dtype(self) -> torch.dtype:
        """Type of losses and gradient sums: fp32, or fp64 for fp64 runs."""
        return torch.float64 if self.config.train.dtype == "fp64" else torch.float32

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type of sums over ranks that are reported: fp64 where the device has it."""
        return sum_dtype(self.backend)

    @property
    def num_lanes(self) -> int:
        """Virtual lanes of the data, the same in all phases."""
        return self.config.data.num_lanes or self.config.train.global_batch_size

    @property
    def vision(self) -> VisionGeometry | None:
        """How the model takes pictures, for the loader; None: it takes text only."""
        return vision_geometry(self.config.model)

    @property
    def counts_data(self) -> bool:
        """Whether this rank speaks for those that have the same sequences."""
        return self.meshes.pp.get_local_rank() == self.meshes.sequence.get_local_rank() == 0

    def data_lanes(self) -> list[str]:
        """Keys of the positions in the data that this rank saves and restores."""
        return owned_items(self.num_lanes, self.data_rank, self.data_size)


def sum_dtype(backend: Backend) -> torch.dtype:
    """Type of sums over ranks that are reported: fp64 where the device has it."""
    return torch.float64 if backend.capabilities.fp64 else torch.float32
