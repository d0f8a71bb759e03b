"""Batches for the training loop and for evaluation: `train.loop` and `train.evaluate` call this.

The state after a batch travels with it, so batches that were prepared ahead but not trained on are
prepared again after a restart, and no bookkeeping is needed to stop at any step.

A rank's lanes are prepared by the loader's thread, or by `num_workers` processes that have a fixed
part of them each: the lanes do not know which, and their sequences are joined in lane order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from data.config import DataConfig
from data.lanes import Stream
from data.manifest import SPLITS
from data.packing import Batch, PackingRules, join, pack
from data.pictures import (
    VisionGeometry,
    has_pictures,
    picture_documents,
    picture_lengths,
    picture_problems,
)
from data.prefetch import prefetch
from data.resume import ORDER, lane_name, lane_range, open_lanes, save_lanes
from data.rules import check_lanes, problems
from data.sources import fingerprint, open_sources, vocab_size
from data.tokenizer import padding_id
from data.workers import in_processes

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
    vision: VisionGeometry | None = None,
) -> Iterator[Item]:
    """Iterate without end over this data rank's part of every global batch.

    Concatenated in rank order, the parts are the same global batches for every data_size, number of
    workers and depth of prefetching.

    Args:
        config: what to read.
        split: train or validation.
        seed: of the order.
        global_batch_size: sequences of a batch over all data ranks.
        data_rank: which part, 0 <= data_rank < data_size.
        data_size: ranks that see different sequences; each gets global_batch_size / data_size.
        state: key -> JSON as yielded with the last batch that was trained on, of this rank's
            lanes at least; None starts from the beginning.
        vision: how the model takes pictures; None: it takes text only.

    Yields:
        The batch, and the state after it of the lanes that this rank owns.

    Raises:
        ValueError: sizes that do not divide, files that are missing, a state of another order,
            pictures that the model cannot take.
        CorruptShardError: a shard or its index is not what was written.
        DamagedSampleError: on iteration, a sample is not what was written, and not to be skipped.
        UnreadableError: here or on iteration, the storage fails.
        RuntimeError: on iteration, a worker process died.
    """
    found = check_lanes(global_batch_size, data_size, config.num_lanes)
    if split not in SPLITS:
        found.append(f"split={split}: use one of {', '.join(SPLITS)}")
    if config.sequence_length < 1:
        found.append(f"data.sequence_length={config.sequence_length}: use 1 or more")
    if config.prefetch_batches < 0:
        found.append(f"data.prefetch_batches={config.prefetch_batches}: use 0 or more")
    found += problems(config)
    if found := found or list(picture_problems(config, vision, config.sequence_length)):
        raise ValueError("\n".join(found))
    num_lanes = config.num_lanes or global_batch_size
    lanes = lane_range(num_lanes, data_rank, data_size)
    share = LaneShare(
        config=config,
        split=split,
        seed=seed,
        num_lanes=num_lanes,
        sequences_per_lane=global_batch_size // num_lanes,
        lanes=lanes,
        state=state,
        vision=vision if has_pictures(config) else None,
    )
    batches = share.open()  # here in any case: what is wrong is said before a process starts
    workers = min(config.num_workers, len(lanes))
    if not workers:
        return prefetch(batches, config.prefetch_batches)
    jobs = [share.part(number, workers).open for number in range(workers)]
    return _joined(in_processes(jobs, config.prefetch_batches))


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneShare:
    """Neighbouring lanes and all that it takes to prepare their sequences in some process."""

    config: DataConfig
    split: str
    seed: int
    num_lanes: int
    """Of the run."""
    sequences_per_lane: int
    """In a batch."""
    lanes: range
    state: Mapping[str, str] | None
    vision: VisionGeometry | None

    def part(self, number: int, parts: int) -> "LaneShare":
        """The `number`-th of `parts` shares of these lanes, which are at least as many."""
        cuts = [len(self.lanes) * n // parts for n in (number, number + 1)]
        lanes = self.lanes[slice(*cuts)]
        wanted = {ORDER, *map(lane_name, lanes)}
        state = None if self.state is None else {k: v for k, v in self.state.items() if k in wanted}
        return replace(self, lanes=lanes, state=state)

    def open(self) -> Iterator[Item]:
        """Open the sources, and iterate over the lanes' part of every batch."""
        config = self.config
        sources = open_sources(
            config, split=self.split, pictures=picture_documents(config, self.vision)
        )
        stream = Stream(
            config=config,
            documents={name: source.documents for name, source in sources.items()},
            split=self.split,
            seed=self.seed,
            num_lanes=self.num_lanes,
            lengths=picture_lengths(config, self.vision),
        )
        rules = PackingRules(
            sequence_length=config.sequence_length,
            padding_id=padding_id(Path(config.tokenizer)),
            num_sources=len(stream.names),
            vision=self.vision,
        )
        lanes = open_lanes(stream, self.lanes, self.state)

        def batches() -> Iterator[Item]:
            while True:
                sequences = [
                    v.next_sequence() for v in lanes for _ in range(self.sequences_per_lane)
                ]
                faults = tuple(fault for lane in lanes for fault in lane.take_faults())
                yield pack(sequences, rules, faults), save_lanes(stream, lanes)

        return batches()


def _joined(rows: Iterator[list[Item]]) -> Iterator[Item]:
    for row in rows:
        state: dict[str, str] = {}
        for _, of_part in row:
            state |= of_part
        yield join([batch for batch, _ in row]), state
