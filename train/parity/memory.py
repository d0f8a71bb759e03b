"""Whole tables in host memory, and their gradients, for the ledger of `train.parity.run`.

They are put together densely, on every rank: what is compared fits into its memory.
"""

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from parallel.engram_rows import RowStore
from train.training import Training


def table_gradients(training: Training) -> dict[str, Tensor]:
    """The gradients of all rows, summed here without what carries them to their owners.

    Between `HostMemory.reduce` and the update. That they arrive as well the rows show after it.

    Communication: an all-reduce of the tables over the pipeline stage.

    Returns:
        By the names that tables on the device have, on one rank of the stage; nothing on others, and
        while the model is frozen.
    """
    memory = training.memory
    if memory is None or training.model.is_frozen:
        return {}
    ids, gradients = memory.gradients()
    width = memory.geometry.head_dim
    values = torch.from_numpy(gradients).view(-1, width)
    flat = values.new_zeros(memory.geometry.num_rows, width)
    flat.index_add_(0, torch.from_numpy(ids).view(-1), values)
    return _tables(training, flat)


def table_rows(training: Training) -> dict[str, Tensor]:
    """All rows; as `table_gradients`, but from their owners.

    Communication: an all-reduce of the tables over the pipeline stage.
    """
    memory = training.memory
    if memory is None:
        return {}

    def read(store: RowStore) -> NDArray[np.floating]:
        out = np.empty((store.num_local, store.width), store.master)
        store.gather(np.arange(store.num_local), out)
        return out

    own = torch.from_numpy(memory.service.submit(read).result())
    flat = own.new_zeros(memory.geometry.num_rows, memory.geometry.head_dim)
    stage = training.meshes.stage
    flat[stage.get_local_rank() :: stage.size()] = own
    return _tables(training, flat)


def _tables(training: Training, flat: Float[Tensor, "rows width"]) -> dict[str, Tensor]:
    """The sum of the flat tables of all ranks of the stage, cut by layer."""
    assert training.memory is not None
    stage = training.meshes.stage
    whole = flat.to(training.device)
    dist.all_reduce(whole, group=stage.get_group())
    if stage.get_local_rank():
        return {}
    return {
        f"layers.{table.layer}.engram.table.weight": whole[
            table.first_row : table.first_row + table.num_rows
        ]
        for table in training.memory.geometry.tables
    }
