"""Loss on held-out shards: the same sequences every time, so that curves compare."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from data.faults import Fault
from data.loader import build_loader
from train.build import Training
from train.metrics import Record
from train.microbatches import forward, split
from train.step import check_batch


@torch.no_grad()
def evaluate(
    training: Training, on_faults: Callable[[Iterable[Fault]], None] | None = None
) -> Record:
    """Next-token loss on the first `evaluate.num_sequences` packed sequences of the held-out split.

    Communication: one all-reduce of two numbers over the world, and that of `check_batch`.

    Args:
        training: the model.
        on_faults: told of the samples that were left out, on the rank that read them.

    Returns:
        `validation/loss` in nats per token, the same on every rank.
    """
    config = training.config
    loader = build_loader(
        # One batch is not worth the start of processes.
        replace(config.data, num_lanes=None, prefetch_batches=0, num_workers=0),
        split="validation",
        seed=config.train.seed,
        global_batch_size=config.evaluate.num_sequences,
        data_rank=training.data_rank,
        data_size=training.data_size,
        vision=training.vision,
    )
    batch, _ = next(loader)
    if on_faults is not None:
        on_faults(batch.faults)
    check_batch(training, batch)
    training.model.eval()
    sums = torch.zeros(2, dtype=training.sum_dtype, device=training.device)
    memory = training.memory
    with memory.reading(batch) if memory is not None else nullcontext():
        sums[0] = forward(training, split(batch, config.train.micro_batch_size))[0]
    labels = training.model.split.of(batch.labels.shape[1]).take(batch.labels)
    # Every stage of a pipeline counts them.
    sums[1] = (labels >= 0).sum() / training.meshes.pp.size()
    dist.all_reduce(sums)
    total, tokens = sums.tolist()
    return {"validation/loss": total / max(1.0, tokens)}
