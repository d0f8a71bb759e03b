"""Documents that exist only as numbers, for tests of what lanes do with them."""

from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from data.config import DataConfig, SourceConfig, WeightChange
from data.content import Content, Piece
from data.faults import DamagedSampleError, Fault
from data.lanes import Lane, Stream

Span = tuple[int, int]


class FakeDocuments:
    """Documents of given lengths, with spans that must stay whole, some of them damaged."""

    def __init__(
        self,
        lengths: Sequence[int],
        spans: Sequence[Sequence[Span]] | None = None,
        damaged: frozenset[int] = frozenset(),
        name: str = "fake",
    ) -> None:
        self.lengths, self.damaged, self.name = lengths, damaged, name
        self._spans = spans or [()] * len(lengths)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def num_tokens(self, document: int) -> int:
        return self.lengths[document]

    def spans(self, document: int) -> Sequence[Span]:
        return self._spans[document]

    def read(self, document: int) -> Content:
        self.reads.append(document)
        if document in self.damaged:
            fault = Fault(self.name, "shard-000000.tar", f"{document:04d}", "checksum", "flipped")
            raise DamagedSampleError(fault, "restore it")
        return Content(np.arange(self.lengths[document], dtype=np.uint32))


def make_stream(
    documents: Mapping[str, FakeDocuments],
    *,
    weights: dict[str, int] | None = None,
    epochs: dict[str, int] | None = None,
    schedule: Sequence[tuple[int, dict[str, int]]] = (),
    num_lanes: int = 4,
    seed: int = 1,
    split: str = "train",
    **config: object,
) -> Stream:
    """A stream over fakes; `config` are keys of DataConfig."""
    sources = {
        name: SourceConfig(
            path=name, weight=(weights or {}).get(name, 1), epochs=(epochs or {}).get(name)
        )
        for name in documents
    }
    changes = tuple(WeightChange(tokens=tokens, weights=change) for tokens, change in schedule)
    config = {"sequence_length": 10, **config}
    return Stream(
        config=DataConfig(sources=sources, weight_schedule=changes, **config),  # type: ignore[arg-type]
        documents=documents,
        split=split,
        seed=seed,
        num_lanes=num_lanes,
    )


def places(pieces: Sequence[Piece]) -> list[tuple[int, int, int, int]]:
    """Source, document, start and stop of pieces, which compare unlike their contents."""
    return [(piece.source, piece.document, piece.start, piece.stop) for piece in pieces]


def all_sequences(lane: Lane, until: type[Exception]) -> list[list[tuple[int, int, int, int]]]:
    """Sequences of a lane up to the error that ends it."""
    sequences = []
    for _ in count():
        try:
            sequences.append(places(lane.next_sequence()))
        except until:
            return sequences
    raise AssertionError
