"""A lane against streams that are written out in full, and what it refuses."""

from itertools import accumulate, chain

import pytest

from data.config import FaultConfig
from data.faults import DamagedSampleError
from data.lanes import Lane, NoDocumentsLeftError, Stream
from tests.unit.data.fakes import FakeDocuments, all_sequences, make_stream, places


def stream(**changes: object) -> Stream:
    documents = {"code": FakeDocuments([5, 9, 30, 2]), "docs": FakeDocuments([7, 1, 12])}
    return make_stream(documents, weights={"code": 2, "docs": 1}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", [0, 1, 3])
def test_pieces_are_the_documents_cut_every_sequence_length(lane: int) -> None:
    """Whole documents from a lane with one endless sequence, cut with a running sum instead."""
    whole = places(Lane(stream(sequence_length=400), lane).next_sequence())
    ends = list(accumulate(stop for *_, stop in whole))
    expected: list[list[tuple[int, int, int, int]]] = [[] for _ in range(40)]
    for (source, document, _, length), end in zip(whole, ends, strict=True):
        begin = end - length
        for row in range(40):
            start, stop = max(begin, row * 10), min(end, row * 10 + 10)
            if start < stop:
                expected[row].append((source, document, start - begin, stop - begin))
    cut = Lane(stream(), lane)
    assert [places(cut.next_sequence()) for _ in range(40)] == expected


def test_lanes_begin_with_different_sources() -> None:
    firsts = [Lane(stream(num_lanes=6), lane).next_sequence()[0].source for lane in range(6)]
    assert sorted(firsts) == [0, 0, 0, 0, 1, 1]


def test_seed_and_split_change_the_order() -> None:
    def order(**changes: object) -> list[list[tuple[int, int, int, int]]]:
        documents = {name: FakeDocuments([3] * 50) for name in ("code", "docs")}
        lane = Lane(make_stream(documents, **changes), 0)  # type: ignore[arg-type]
        return [places(lane.next_sequence()) for _ in range(20)]

    assert order() == order()
    assert order() != order(seed=2)
    assert order() != order(split="validation")


def test_a_picture_is_not_cut() -> None:
    """By hand: 4 + 5 picture tokens + 3, into sequences of 6."""
    documents = {"a": FakeDocuments([12], [[(4, 9)]])}
    lane = Lane(make_stream(documents, num_lanes=1, sequence_length=6), 0)
    first = [places(lane.next_sequence()) for _ in range(4)]
    assert first == [
        [(0, 0, 0, 4)],
        [(0, 0, 4, 10)],
        [(0, 0, 10, 12), (0, 0, 0, 4)],
        [(0, 0, 4, 10)],
    ]


def test_a_picture_longer_than_a_sequence_is_refused() -> None:
    lane = Lane(make_stream({"a": FakeDocuments([12], [[(0, 11)]])}, sequence_length=10), 0)
    with pytest.raises(
        ValueError, match=r"data\.sequence_length=10: document 0 of source a has an"
    ):
        lane.next_sequence()


def test_best_fit_by_hand() -> None:
    """Held, in the order drawn: the first begins, then the largest that fits, ties to the older."""
    sizes = [6, 3, 4, 4, 2, 9]
    documents = FakeDocuments(sizes)
    options = {"packing": "best_fit", "lookahead": 3, "num_lanes": 1, "epochs": {"a": 1}}
    order = [
        document
        for pieces in all_sequences(
            Lane(make_stream({"a": documents}, num_lanes=1, epochs={"a": 1}), 0),
            NoDocumentsLeftError,
        )
        for _, document, start, _ in pieces
        if start == 0
    ]
    lane = Lane(make_stream({"a": documents}, **options), 0)  # type: ignore[arg-type]
    queue, expected = list(order), []
    while queue:
        row, room = [queue.pop(0)], 10
        room -= sizes[row[0]]
        while fits := [d for d in queue[:3] if sizes[d] <= room]:
            best = max(fits, key=lambda d: (sizes[d], -queue.index(d)))
            queue.remove(best)
            row.append(best)
            room -= sizes[best]
        expected.append([(0, d, 0, sizes[d]) for d in row])
    assert all_sequences(lane, NoDocumentsLeftError) == expected


def test_best_fit_cuts_only_what_is_longer_than_a_sequence() -> None:
    documents = {"a": FakeDocuments([23, 4, 4, 4, 4])}
    lane = Lane(
        make_stream(documents, num_lanes=1, packing="best_fit", lookahead=4, epochs={"a": 3}), 0
    )
    pieces = list(chain(*all_sequences(lane, NoDocumentsLeftError)))
    assert {(start, stop) for _, document, start, stop in pieces if document == 0} == {
        (0, 10),
        (10, 20),
        (20, 23),
    }
    assert all(stop - start == 4 for _, document, start, stop in pieces if document)


def test_weights_change_at_the_first_sequence_after_their_tokens() -> None:
    """Documents as long as a sequence: one draw a sequence, 4 lanes x 10 tokens a round."""
    documents = {name: FakeDocuments([10] * 100) for name in ("a", "b")}
    lane = Lane(
        make_stream(
            documents,
            weights={"b": 0},
            schedule=[(80, {"a": 0, "b": 1}), (121, {"a": 1, "b": 1}), (122, {"b": 0})],
        ),
        3,
    )
    drawn = [lane.next_sequence()[0].source for _ in range(6)]
    assert drawn == [0, 0, 1, 1, 0, 0]


def test_running_out_says_what_to_change() -> None:
    lane = Lane(stream(epochs={"code": 2, "docs": 1}, num_lanes=1), 0)
    assert len(all_sequences(lane, NoDocumentsLeftError)) == -(-(46 * 2 + 20) // 10)
    with pytest.raises(
        NoDocumentsLeftError,
        match=r"data\.sources\.code\.epochs=2, data\.sources\.docs\.epochs=1: lane 0 has no document "
        r"left, of the sources with weight, after 120 tokens of the run; use more epochs",
    ):
        lane.next_sequence()


def test_damage_raises_or_is_skipped_up_to_a_share() -> None:
    def lane(**faults: object) -> Lane:
        documents = {"a": FakeDocuments([10] * 40, damaged=frozenset({3, 7, 11}))}
        config = FaultConfig(**faults)  # type: ignore[arg-type]
        return Lane(make_stream(documents, num_lanes=1, faults=config, epochs={"a": 1}), 0)

    with pytest.raises(DamagedSampleError, match=r"key 00\d\d: checksum, flipped; restore it"):
        all_sequences(lane(), NoDocumentsLeftError)
    patient = lane(damaged="skip", max_skipped_fraction=0.5)
    assert len(all_sequences(patient, NoDocumentsLeftError)) == 37
    assert sorted(fault.key for fault in patient.take_faults()) == ["0003", "0007", "0011"]
    assert patient.take_faults() == []
    strict = lane(damaged="skip", max_skipped_fraction=0.0)
    with pytest.raises(DamagedSampleError, match=r"left out 2 of \d+ .*max_skipped_fraction=0\.0"):
        all_sequences(strict, NoDocumentsLeftError)


def test_a_document_is_read_once() -> None:
    documents = FakeDocuments([95])
    lane = Lane(make_stream({"a": documents}, num_lanes=1), 0)
    for _ in range(9):
        lane.next_sequence()
    assert documents.reads == [0]
