"""Loss on held-out shards: the same sequences every time, so that curves compare."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from data.faults import Fault
from data.loader import build_loader
from train.metrics import Record
from train.microbatches import forward, split
from train.recall import NUM_SUMS, recall_record, recall_sums
from train.step import check_batch
from train.training import Training


@torch.no_grad()
def evaluate(
    training: Training, on_faults: Callable[[Iterable[Fault]], None] | None = None
) -> Record:
    """Next-token loss on the first `evaluate.num_sequences` packed sequences of the held-out split.

    Communication: one all-reduce of six numbers over the world, and that of `check_batch`.

    Args:
        training: the model.
        on_faults: told of the samples that were left out, on the rank that read them.

    Returns:
        `validation/loss` in nats per token and `validation/checksum` of the sequences, the same on every
        rank; with `evaluate.num_questions`, what `train.recall` says.
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
    sums = torch.zeros(3 + NUM_SUMS, dtype=training.sum_dtype, device=training.device)
    microbatches = split(batch, config.train.micro_batch_size)
    memory = training.memory
    with memory.reading(batch) if memory is not None else nullcontext():
        sums[0] = forward(training, microbatches)[0]
        if config.evaluate.num_questions:
            sums[3:] = recall_sums(training, microbatches, sums)
    labels = training.model.split.of(batch.labels.shape[1]).take(batch.labels)
    # Every stage of a pipeline counts them.
    sums[1] = (labels >= 0).sum() / training.meshes.pp.size()
    sums[2] = batch.checksum if training.counts_data else 0
    dist.all_reduce(sums)
    total, tokens, checksum = sums[:3].tolist()
    record: Record = {"validation/loss": total / max(1.0, tokens), "validation/checksum": checksum}
    return record | recall_record(sums[3:])
