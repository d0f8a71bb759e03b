"""Batches for the training loop and for evaluation: `train.loop` and `train.evaluate` call this.

The state after a batch travels with it, so batches that were prepared ahead but not trained on are
prepared again after a restart, and no bookkeeping is needed to stop at any step.
"""

from collections.abc import Iterator
from typing import TypeAlias

from data.config import DataConfig
from data.lanes import Lane, Stream
from data.packing import Batch, pack
from data.prefetch import prefetch
from data.resume import lane_range, open_lanes, save_lanes
from data.rules import check_lanes, problems
from data.shards import SPLITS
from data.sources import fingerprint, open_sources, vocab_size

__all__ = ["Batch", "build_loader", "fingerprint", "vocab_size"]

Item: TypeAlias = tuple[Batch, dict[str, str]]


def build_loader(
    config: DataConfig,
    *,
    split: str,
    seed: int,
    global_batch_size: int,
    data_rank: int,
    data_size: int,
    state: dict[str, str] | None = None,
) -> Iterator[Item]:
    """Iterate without end over this data rank's part of every global batch.

    Concatenated in rank order, the parts are the same global batches for every data_size.

    Args:
        config: what to read.
        split: train or validation.
        seed: of the order.
        global_batch_size: sequences of a batch over all data ranks.
        data_rank: which part, 0 <= data_rank < data_size.
        data_size: ranks that see different sequences; each gets global_batch_size / data_size.
        state: key -> JSON as yielded with the last batch that was trained on, of this rank's
            lanes at least; None starts from the beginning.

    Yields:
        The batch, and the state after it of the lanes that this rank owns.

    Raises:
        ValueError: sizes that do not divide, files that are missing, a state of another order.
        CorruptShardError: a shard or its index is not what was written.
        DamagedSampleError: on iteration, a sample is not what was written, and not to be skipped.
        UnreadableError: here or on iteration, the storage fails.
    """
    found = check_lanes(global_batch_size, data_size, config.num_lanes)
    if split not in SPLITS:
        found.append(f"split={split}: use one of {', '.join(SPLITS)}")
    if config.sequence_length < 1:
        found.append(f"data.sequence_length={config.sequence_length}: use 1 or more")
    if config.prefetch_batches < 0:
        found.append(f"data.prefetch_batches={config.prefetch_batches}: use 0 or more")
    found += problems(config)
    if found:
        raise ValueError("\n".join(found))
    num_lanes = config.num_lanes or global_batch_size
    sources = open_sources(config, split=split)
    stream = Stream(
        config=config,
        documents={name: source.documents for name, source in sources.items()},
        split=split,
        seed=seed,
        num_lanes=num_lanes,
    )
    lanes = open_lanes(stream, lane_range(num_lanes, data_rank, data_size), state)
    return prefetch(
        _batches(stream, lanes, global_batch_size // num_lanes), config.prefetch_batches
    )


def _batches(stream: Stream, lanes: list[Lane], sequences_per_lane: int) -> Iterator[Item]:
    while True:
        sequences = [lane.next_sequence() for lane in lanes for _ in range(sequences_per_lane)]
        yield pack(sequences, stream.config.sequence_length), save_lanes(stream, lanes)
