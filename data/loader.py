"""Batches for the training loop and for evaluation: `train.loop` and `train.evaluate` call this.

The state after a batch travels with it, so batches that were prepared ahead but not trained on are
prepared again after a restart, and no bookkeeping is needed to stop at any step.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.lanes import Lane, Stream, check_lanes, lane_name, lane_range
from data.packing import Batch, Piece, pack
from data.prefetch import prefetch
from data.reader import SplitReader
from data.shards import SPLITS, Manifest, corpus_fingerprint, file_sha256

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
        state: lane name -> JSON as yielded with the last batch that was trained on, of this rank's
            lanes at least; None starts from the beginning.

    Yields:
        The batch, and the state after it of the lanes that this rank owns.

    Raises:
        ValueError: sizes that do not divide, files that are missing, a state of another order.
        CorruptShardError: here or on iteration, bytes on disk are not those that were written.
    """
    problems = check_lanes(global_batch_size, data_size, config.num_lanes)
    if split not in SPLITS:
        problems.append(f"split={split}: use one of {', '.join(SPLITS)}")
    if config.sequence_length < 1:
        problems.append(f"data.sequence_length={config.sequence_length}: use 1 or more")
    if config.prefetch_batches < 0:
        problems.append(f"data.prefetch_batches={config.prefetch_batches}: use 0 or more")
    if problems:
        raise ValueError("\n".join(problems))
    num_lanes = config.num_lanes or global_batch_size
    readers = _open_sources(config, split)
    stream = Stream(
        names=tuple(readers),
        weights=tuple(config.sources[name].weight for name in readers),
        documents=tuple(readers.values()),
        split=split,
        seed=seed,
        num_lanes=num_lanes,
        sequence_length=config.sequence_length,
    )
    lanes = [
        _LaneReader(Lane(stream, index, _lane_state(state, index)), tuple(readers.values()))
        for index in lane_range(num_lanes, data_rank, data_size)
    ]
    batches = _batches(lanes, global_batch_size // num_lanes, config.sequence_length)
    return prefetch(batches, config.prefetch_batches)


def fingerprint(config: DataConfig) -> str:
    """Identify corpus and tokenizer; a run goes on only with the ones it began with.

    Raises:
        ValueError: a file is missing.
    """
    sources = {name: Path(source.path) for name, source in config.sources.items()}
    return corpus_fingerprint(sources, Path(config.tokenizer))


def vocab_size(config: DataConfig) -> int:
    """Size of the vocabulary that the token ids come from; every id is below it.

    Raises:
        ValueError: a manifest is missing.
    """
    return max(
        Manifest.read(Path(source.path) / "train", key=f"data.sources.{name}.path").vocab_size
        for name, source in config.sources.items()
    )


def _open_sources(config: DataConfig, split: str) -> dict[str, SplitReader]:
    """Readers by name, sorted; every source must hold ids of the configured tokenizer."""
    if not config.sources:
        raise ValueError("data.sources={}: needs a source; use e.g. {code: {path: corpus/code}}")
    tokenizer = file_sha256(Path(config.tokenizer), key=f"data.tokenizer={config.tokenizer}")
    readers = {}
    for name, source in sorted(config.sources.items()):
        if source.weight < 1:
            raise ValueError(
                f"data.sources.{name}.weight={source.weight}: must be positive; use 1 or more, or "
                "leave the source out"
            )
        reader = SplitReader(Path(source.path), source=name, split=split)
        if reader.manifest.tokenizer_sha256 != tokenizer:
            raise ValueError(
                f"data.tokenizer={config.tokenizer}: data.sources.{name}.path={source.path} holds "
                "token ids of another tokenizer; use the tokenizer.json that was built with it"
            )
        readers[name] = reader
    return readers


def _lane_state(state: Mapping[str, str] | None, index: int) -> str | None:
    if state is None:
        return None
    if lane_name(index) not in state:
        raise ValueError(
            f"{lane_name(index)}: the saved data position has {len(state)} lanes and not this one; "
            "keep data.num_lanes (null: train.global_batch_size) as it was"
        )
    return state[lane_name(index)]


class _LaneReader:
    """A lane with the tokens of the document it is in, so that a long one is read once."""

    def __init__(self, lane: Lane, readers: tuple[SplitReader, ...]) -> None:
        self.lane = lane
        self._readers = readers
        self._open: tuple[int, int] | None = None
        self._tokens: NDArray[np.unsignedinteger]

    def next_sequence(self) -> list[Piece]:
        pieces = []
        for span in self.lane.next_sequence():
            if self._open != (span.source, span.document):
                self._tokens = self._readers[span.source].tokens(span.document)
                self._open = (span.source, span.document)
            pieces.append(Piece(self._tokens, span.start, span.stop))
        return pieces


def _batches(
    lanes: list[_LaneReader], sequences_per_lane: int, sequence_length: int
) -> Iterator[Item]:
    while True:
        sequences = [lane.next_sequence() for lane in lanes for _ in range(sequences_per_lane)]
        state = {lane_name(reader.lane.index): reader.lane.state() for reader in lanes}
        yield pack(sequences, sequence_length), state
