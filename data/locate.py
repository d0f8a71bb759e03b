"""What a batch was made of: source, shard and key of every piece, without training.

`train.locate` calls this for a run. Lanes are walked from a saved position, or from the start, to the
step in question. That takes the index alone and some 20 microseconds a document of a lane, unless
damaged samples are skipped: then what is skipped decides what follows, and the walk reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.config import DataConfig
from data.content import Content, Documents
from data.lanes import Lane, Stream
from data.resume import open_lanes, save_lanes
from data.sources import Pictures, Source, open_sources


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Consecutive steps with batches of one shape."""

    steps: range
    sequence_length: int
    global_batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A piece of a sequence, and where it lies."""

    sample: int
    """Which sequence of the global batch."""
    lane: int
    source: str
    shard: str
    key: str
    start: int
    stop: int
    """Tokens start..stop (exclusive) of the document."""


def locate(
    config: DataConfig,
    *,
    seed: int,
    num_lanes: int,
    shapes: Sequence[BatchShape],
    step: int,
    sample: int | None = None,
    state: Mapping[str, str] | None = None,
    lengths: Mapping[str, object] | None = None,
    pictures: Pictures | None = None,
) -> list[Place]:
    """The pieces of one sequence, or of all, of the global batch of a step.

    Args:
        config: what is read.
        seed: of the order.
        num_lanes: of the run.
        shapes: of all batches between the state and the step, the first perhaps in part.
        step: which batch.
        sample: which sequence of it; None: all.
        state: positions before the first step of `shapes`; None: the start of the run.
        lengths: see `Stream`.
        pictures: of the model; None: it takes none.

    Raises:
        ValueError: there is no such step or sample, or what `open_sources` and `open_lanes` refuse.
        DamagedSampleError: a sample on the way is damaged and not to be skipped.
    """
    shape = next((shape for shape in shapes if step in shape.steps), None)
    if shape is None:
        known = ", ".join(f"{s.steps.start} to {s.steps.stop - 1}" for s in shapes)
        raise ValueError(f"--step {step}: not known; use a step of {known}")
    if sample is not None and not 0 <= sample < shape.global_batch_size:
        raise ValueError(
            f"--sample {sample}: step {step} has {shape.global_batch_size} sequences; use 0 to "
            f"{shape.global_batch_size - 1}"
        )
    sources = open_sources(config, split="train", pictures=pictures)
    reads = config.faults.damaged == "skip"
    documents = {
        name: source.documents if reads else _Unread(source.documents)
        for name, source in sources.items()
    }
    per_lane = shape.global_batch_size // num_lanes
    wanted = range(num_lanes) if sample is None else [sample // per_lane]
    found = []
    for index in wanted:
        walk = _Walk(config, documents, seed, num_lanes, lengths or {}, state)
        lane = walk.to(index, shapes, step)
        for number in range(per_lane):
            places = _places(lane, sources, index * per_lane + number)
            if sample in (None, index * per_lane + number):
                found += places
    return found


@dataclass(frozen=True, slots=True)
class _Walk:
    """Goes along one lane."""

    config: DataConfig
    documents: Mapping[str, Documents]
    seed: int
    num_lanes: int
    lengths: Mapping[str, object]
    state: Mapping[str, str] | None

    def to(self, index: int, shapes: Sequence[BatchShape], step: int) -> Lane:
        """The lane before its first sequence of the step."""
        state = self.state
        for shape in shapes:
            stream = Stream(
                config=replace(self.config, sequence_length=shape.sequence_length),
                documents=self.documents,
                split="train",
                seed=self.seed,
                num_lanes=self.num_lanes,
                lengths=self.lengths,
            )
            [lane] = open_lanes(stream, [index], state)
            for at in shape.steps:
                if at == step:
                    return lane
                for _ in range(shape.global_batch_size // self.num_lanes):
                    lane.next_sequence()
            state = save_lanes(stream, [lane])
        raise AssertionError(step)


def _places(lane: Lane, sources: Mapping[str, Source], sample: int) -> list[Place]:
    names = sorted(sources)
    places = []
    for piece in lane.next_sequence():
        name = names[piece.source]
        shard, key = sources[name].place(piece.document)
        places.append(
            Place(
                sample=sample,
                lane=lane.index,
                source=name,
                shard=shard,
                key=key,
                start=piece.start,
                stop=piece.stop,
            )
        )
    return places


class _Unread:
    """Documents of which only the lengths are asked."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def num_tokens(self, document: int) -> int:
        return self._documents.num_tokens(document)

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        return self._documents.spans(document)

    def read(self, document: int) -> Content:
        return Content(np.empty(0, np.uint32))
