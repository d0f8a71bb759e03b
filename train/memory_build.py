"""Engram's tables of this rank in host memory, put together; called by `train.build`."""

from pathlib import Path

import torch
import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.engram_optimizers import LazyAdam, RowAdagrad, RowOptimizer, SinkhornMomentum
from parallel.engram_rows import RowStore
from parallel.engram_service import TableService
from parallel.layout import ParallelLayout
from parallel.mesh import host_group
from train.config import OptimConfig, RunConfig
from train.memory import HostMemory
from train.memory_plan import MemoryGeometry, MemoryPlanner
from train.rank_model import RankModel


def build_memory(
    config: RunConfig,
    backend: Backend,
    layout: ParallelLayout,
    model: RankModel,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> HostMemory | None:
    """The tables of the memories of this rank, at zero, from which these look their rows up.

    Communication: creates process groups, so all ranks of the world call it.

    Args:
        config: the recipe; its rules hold.
        backend: of the device.
        layout: of the world.
        model: without tables of its own; its hashes know the tokenizer.
        device: of the model.
        dtype: that the model computes in.

    Returns:
        None on ranks whose stages have no memory.
    """
    tables = config.parallel.engram
    group = host_group(layout, tables.timeout_seconds)
    engrams = model.engram_layers()
    if not engrams:
        return None
    geometry = MemoryGeometry.of(engrams)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    exact = config.train.dtype == "fp64"
    store = RowStore(
        geometry.num_rows,
        geometry.head_dim,
        row_optimizer(config.optim),
        rank=rank,
        ranks=ranks,
        dtype="fp64" if exact else tables.dtype,
        storage=tables.storage,
        seed=config.train.seed,
        path=None if tables.path is None else Path(tables.path),
        huge_pages=tables.huge_pages,
    )
    data = layout.data_rank(dist.get_rank()), layout.data_parallel_size
    memory = HostMemory(
        TableService(
            store, group, prefetch=tables.prefetch, timeout_seconds=tables.timeout_seconds
        ),
        MemoryPlanner(engrams, geometry, model.split, data=data, ranks=ranks),
        geometry,
        backend=backend,
        device=device,
        dtype=dtype,
        master_dtype=torch.float64 if exact else torch.float32,
    )
    for layer, engram in engrams.items():
        memory.attach(layer, engram)
    return memory


def row_optimizer(config: OptimConfig) -> RowOptimizer:
    """What changes the rows; none of them decays."""
    match config.engram_optimizer:
        case "adam":
            return LazyAdam(config.beta1, config.beta2, config.eps)
        case "adagrad":
            return RowAdagrad(config.eps)
        case "sinkhorn":
            return SinkhornMomentum(config.momentum, config.update_rms)
