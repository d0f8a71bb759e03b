"""Engram's tables of this rank in host memory, put together; called by `train.build`."""

import platform
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.config import EngramTableConfig
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
    in_fp64 = config.train.dtype == "fp64"
    assert tables.storage != "device", "the tables are parameters"
    store = RowStore(
        geometry.num_rows,
        geometry.head_dim,
        row_optimizer(config.optim),
        rank=rank,
        ranks=ranks,
        dtype=tables.dtype,
        storage=tables.storage,
        seed=config.train.seed,
        path=table_path(tables, layout),
        huge_pages=tables.huge_pages,
        master=np.float64 if in_fp64 else np.float32,
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
        master_dtype=torch.float64 if in_fp64 else torch.float32,
    )
    for layer, engram in engrams.items():
        memory.attach(layer, engram)
    return memory


def table_path(tables: EngramTableConfig, layout: ParallelLayout) -> Path | None:
    """Where this rank's files are; ranks of several pipeline stages may be on one node.

    Raises:
        ValueError: the directory of the recipe does not exist on this node.
    """
    if tables.path is None:
        return None
    directory = Path(tables.path)
    if not directory.is_dir():
        raise ValueError(
            f"parallel.engram.path={directory}: no such directory on {platform.node()}; make it "
            "first, on every node"
        )
    own = directory / f"pipeline-{layout.coordinates(dist.get_rank())['pp']}"
    own.mkdir(exist_ok=True)
    return own


def row_optimizer(config: OptimConfig) -> RowOptimizer:
    """What changes the rows; none of them decays."""
    match config.engram_optimizer:
        case "adam":
            return LazyAdam(config.beta1, config.beta2, config.eps)
        case "adagrad":
            return RowAdagrad(config.eps)
        case "sinkhorn":
            return SinkhornMomentum(config.momentum, config.update_rms)
