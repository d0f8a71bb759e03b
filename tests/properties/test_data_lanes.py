"""Streams over documents that are only numbers: all packings, schedules, epochs, blocks and faults."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import FaultConfig
from data.content import Piece
from data.faults import Fault
from data.lanes import Lane, NoDocumentsLeftError, Stream
from data.order import credit_after, permute_blocks
from data.resume import lane_range, open_lanes, owned_items, save_lanes
from tests.unit.data.fakes import FakeDocuments, Span, make_stream, places

_LANES = 8
Place = tuple[int, int, int, int]


@st.composite
def fake_documents(draw: st.DrawFn, sequence_length: int, damage: bool = True) -> FakeDocuments:
    """Documents with spans that fit into a sequence, some of them damaged."""
    lengths, spans = [], []
    for _ in range(draw(st.integers(1, 12))):
        gaps = draw(
            st.lists(st.tuples(st.integers(0, 9), st.integers(1, sequence_length)), max_size=3)
        )
        at, found = 0, []
        for gap, size in gaps:
            found.append((at + gap, at + gap + size))
            at += gap + size
        lengths.append(at + draw(st.integers(1, 3 * sequence_length)))
        spans.append(found)
    numbers = st.integers(0, len(lengths) - 1)
    damaged = draw(st.frozensets(numbers, max_size=2)) if damage else frozenset()
    return FakeDocuments(lengths, spans, damaged if len(damaged) < len(lengths) else frozenset())


@st.composite
def streams(
    draw: st.DrawFn, /, *, epochs: bool = False, damage: bool = True, **fixed: Any
) -> dict[str, Any]:
    """Arguments of `make_stream`: everything that the order may depend on.

    Not the stream itself, for beartype looks at random elements of what it is made from, and a
    strategy may not use `random`.
    """
    sequence_length = draw(st.integers(4, 40))
    names = draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    documents = {name: draw(fake_documents(sequence_length, damage)) for name in names}
    weights = {name: draw(st.integers(0, 4)) for name in names} | {"a": draw(st.integers(1, 4))}
    changes = draw(st.lists(st.integers(1, 30), max_size=3, unique=True))
    schedule = [
        (_LANES * sequence_length * tokens // 2 + 1, {name: draw(st.integers(1, 4))})
        for tokens, name in zip(sorted(changes), names, strict=False)
    ]
    limits = {name: draw(st.integers(1, 3)) for name in names} if epochs else {}
    packing = draw(st.sampled_from(["concat_split", "best_fit"]))
    config: dict[str, Any] = {
        "sequence_length": sequence_length,
        "packing": packing,
        "lookahead": draw(st.integers(2, 5)) if packing == "best_fit" else 8,
        "block_documents": draw(st.integers(1, 4)),
        "window_blocks": draw(st.integers(1, 3)),
        **fixed,
    }
    return {
        "documents": documents,
        "weights": weights,
        "epochs": limits,
        "schedule": schedule,
        "num_lanes": _LANES,
        "seed": draw(st.integers(0, 99)),
        **config,
    }


def build(options: dict[str, Any]) -> Stream:
    faults = FaultConfig(damaged="skip", max_skipped_fraction=1.0)
    return make_stream(**options, faults=faults)


@dataclass
class Step:
    """What all lanes gave in one step."""

    sequences: list[list[Place]]
    faults: list[Fault]


def run(
    stream: Stream, data_size: int, steps: int, state: dict[str, str] | None
) -> tuple[list[Step], dict[str, str]]:
    """Steps of `data_size` ranks, each of which knows only its own items of the state."""
    merged: dict[str, str] = {}
    ranks = []
    for rank in range(data_size):
        keys = owned_items(_LANES, rank, data_size)
        own = None if state is None else {key: state[key] for key in keys}
        lanes = open_lanes(stream, lane_range(_LANES, rank, data_size), own)
        ranks.append([_step(lanes) for _ in range(steps)])
        merged |= save_lanes(stream, lanes)
    joined = [
        Step(
            [sequence for part in parts for sequence in part.sequences],
            [fault for part in parts for fault in part.faults],
        )
        for parts in zip(*ranks, strict=True)
    ]
    return joined, merged


def _step(lanes: list[Lane]) -> Step:
    sequences = [places(lane.next_sequence()) for lane in lanes]
    return Step(sequences, [fault for lane in lanes for fault in lane.take_faults()])


@settings(deadline=None, max_examples=15)
@given(options=streams(), data=st.data())
def test_kill_anywhere_and_go_on_with_any_data_size(
    options: dict[str, Any], data: st.DataObject
) -> None:
    stream = build(options)
    steps = 12
    expected, last = run(stream, 1, steps, None)
    got: list[Step] = []
    state = None
    while len(got) < steps:
        size = data.draw(st.sampled_from([1, 2, 8, 4]))
        more, state = run(stream, size, data.draw(st.integers(1, steps - len(got))), state)
        got += more
    assert got == expected
    assert state == last


def finish(lane: Lane) -> list[list[Piece]]:
    sequences = []
    while True:
        try:
            sequences.append(lane.next_sequence())
        except NoDocumentsLeftError:
            return sequences


@settings(deadline=None, max_examples=30)
@given(options=streams(epochs=True))
def test_each_epoch_has_every_document_once_and_only_damage_is_missing(
    options: dict[str, Any],
) -> None:
    """Of the sources that a lane may draw from to the end, and each document in order and whole."""
    stream = build(options)
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    missing: dict[str, Counter[int]] = defaultdict(Counter)
    for index in range(_LANES):
        lane = Lane(stream, index)
        # Where cut documents go on; a lane may hold one document for two epochs at once.
        following: Counter[tuple[int, int, int]] = Counter()
        full = stream.config.sequence_length
        for sequence in finish(lane):
            assert sum(piece.stop - piece.start for piece in sequence) <= full
            for piece in sequence:
                documents = stream.documents[stream.names[piece.source]]
                following[piece.source, piece.document, piece.start] -= piece.start > 0
                assert min(following.values(), default=0) >= 0
                assert piece.start < piece.stop
                for span in documents.spans(piece.document):
                    assert not span_is_cut(span, piece)
                if piece.stop < documents.num_tokens(piece.document):
                    following[piece.source, piece.document, piece.stop] += 1
                else:
                    counts[stream.names[piece.source]][piece.document] += 1
        assert not +following
        for fault in lane.take_faults():
            missing[fault.source][int(fault.key)] += 1
    total_missing = sum((Counter(found) for found in missing.values()), Counter[int]()).total()
    expected_missing = 0
    for name, documents in stream.documents.items():
        assert isinstance(documents, FakeDocuments)
        if not all(weights[stream.names.index(name)] for _, weights in stream.eras):
            continue  # a lane may end while it has no weight
        epochs = stream.config.sources[name].epochs
        assert epochs is not None
        for document in range(len(documents)):
            damaged = document in documents.damaged
            assert counts[name][document] == (0 if damaged else epochs)
            expected_missing += epochs * damaged
    assert total_missing >= expected_missing


def span_is_cut(span: Span, piece: Piece) -> bool:
    return any(span[0] < edge < span[1] for edge in (piece.start, piece.stop))


@settings(deadline=None, max_examples=30)
@given(options=streams(packing="concat_split", lookahead=8), lane=st.integers(0, _LANES - 1))
def test_concatenation_wastes_only_what_a_picture_would_not_fit(
    options: dict[str, Any], lane: int
) -> None:
    stream = build(options)
    one = Lane(stream, lane)
    for _ in range(10):
        sequence = one.next_sequence()
        room = stream.config.sequence_length - sum(p.stop - p.start for p in sequence)
        if room:
            [held] = one._held
            start, stop = next(span for span in held.spans if span[0] == held.start)
            assert stop - start > room


@settings(deadline=None, max_examples=30)
@given(
    options=streams(damage=False, packing="concat_split", lookahead=8),
    index=st.integers(0, _LANES - 1),
)
def test_draws_are_within_one_of_the_weights_between_changes(
    options: dict[str, Any], index: int
) -> None:
    stream = build(options)
    lane = Lane(stream, index)
    drawn: Counter[int] = Counter()
    before = 0
    for _ in range(40):
        cursors, era = list(lane._cursors), lane.progress.era
        lane.next_sequence()
        weights = stream.eras[lane.progress.era][1]
        if lane.progress.era != era or not before:
            drawn, before = Counter(), 1
            start = credit_after(weights, index)
        drawn.update({s: lane._cursors[s] - cursors[s] for s in range(len(weights))})
        total = sum(weights)
        for source, weight in enumerate(weights):
            # Credit before the first draw is what the lane's place in the mixture was worth.
            share = Fraction(weight * drawn.total() + start[source], total)
            assert abs(drawn[source] - share) < 1
            assert weight or not drawn[source]


@settings(deadline=None, max_examples=20)
@given(options=streams(damage=False), index=st.integers(0, _LANES - 1))
def test_draw_k_of_a_lane_is_draw_k_times_lanes_plus_its_number(
    options: dict[str, Any], index: int
) -> None:
    stream = build(options)
    lane = Lane(stream, index)
    seen: dict[int, list[int]] = defaultdict(list)
    for _ in range(10):
        for piece in lane.next_sequence():
            if piece.start == 0:
                seen[piece.source].append(piece.document)
    for source, documents in seen.items():
        size = len(stream.documents[stream.names[source]])
        expected = []
        for k in range(len(documents) + 8):
            epoch, position = divmod(k * _LANES + index, size)
            expected.append(
                permute_blocks(
                    position,
                    size,
                    seed=stream.seed,
                    stream=f"train/{stream.names[source]}",
                    epoch=epoch,
                    block=stream.config.block_documents,
                    window=stream.config.window_blocks,
                )
            )
        if stream.config.packing == "concat_split":
            assert documents == expected[: len(documents)]
        else:
            assert not Counter(documents) - Counter(expected)


@settings(deadline=None, max_examples=15)
@given(options=streams(damage=False), data=st.data())
def test_damage_in_one_lane_changes_no_other(options: dict[str, Any], data: st.DataObject) -> None:
    stream = build(options)
    whole = [step.sequences for step in run(stream, 1, 8, None)[0]]
    victim = data.draw(st.integers(0, _LANES - 1))
    read = {(p[0], p[1]) for sequences in whole for p in sequences[victim]}
    source, document = data.draw(st.sampled_from(sorted(read)))
    documents = stream.documents[stream.names[source]]
    assert isinstance(documents, FakeDocuments)
    touched = {
        lane
        for sequences in whole
        for lane, sequence in enumerate(sequences)
        if (source, document) in {(p[0], p[1]) for p in sequence}
    }
    documents.damaged = frozenset({document}) if len(documents) > 1 else frozenset()
    steps = run(stream, 1, 8, None)[0]
    for before, after in zip(whole, steps, strict=True):
        for lane in set(range(_LANES)) - touched:
            assert before[lane] == after.sequences[lane]
        assert all((source, document) != place[:2] for s in after.sequences for place in s) or not (
            documents.damaged
        )
