"""Items of a checkpoint: their keys, their size, and which runs may go on with them."""

import json
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest

from data.config import FaultConfig
from data.content import Content
from data.lanes import Stream
from data.resume import lane_range, open_lanes, owned_items, save_lanes
from tests.unit.data.fakes import FakeDocuments, Span, make_stream, places


def stream(**changes: object) -> Stream:
    names = changes.pop("names", ("code", "docs"))
    documents = {name: FakeDocuments([5, 9, 30, 2]) for name in names}  # type: ignore[attr-defined]
    return make_stream(documents, **changes)  # type: ignore[arg-type]


def saved(of: Stream, sequences: int = 3) -> dict[str, str]:
    """State after some sequences of every lane."""
    lanes = open_lanes(of, range(of.num_lanes), None)
    for lane in lanes:
        for _ in range(sequences):
            lane.next_sequence()
    return save_lanes(of, lanes)


@pytest.mark.parametrize(("lanes", "size"), [(8, 1), (8, 4), (12, 3), (5, 5)])
def test_ranks_share_the_lanes_in_order(lanes: int, size: int) -> None:
    shares = [list(lane_range(lanes, rank, size)) for rank in range(size)]
    assert list(chain(*shares)) == list(range(lanes))
    assert owned_items(8, 1, 4) == ["order", "lane/000002", "lane/000003"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 2}, r"train\.seed=2: the saved data position has 1\n"),
        ({"num_lanes": 2}, r"data\.num_lanes=2: .* has 4\n"),
        ({"weights": {"code": 3}}, r"data\.sources\.code\.weight=3: .* has 1\n"),
        ({"epochs": {"code": 3}}, r"data\.sources\.code\.epochs=3: .* has null\n"),
        ({"names": ("code", "text")}, r"data\.sources\.docs\.weight=nothing: .* has 1\n"),
        ({"packing": "best_fit"}, r'data\.packing="best_fit": .* has "concat_split"\n'),
        ({"block_documents": 2}, r"data\.block_documents=2: .* has 1\n"),
    ],
)
def test_another_order_is_refused(changes: dict[str, object], problem: str) -> None:
    state = saved(stream())
    with pytest.raises(ValueError, match=problem):
        open_lanes(stream(**changes), [0], state)


def test_what_is_no_part_of_the_order_may_change() -> None:
    state = saved(stream())
    [lane] = open_lanes(stream(sequence_length=7, faults=FaultConfig(damaged="skip")), [1], state)
    assert sum(stop - start for *_, start, stop in places(lane.next_sequence())) == 7


def test_another_version_and_missing_items_are_refused() -> None:
    state = saved(stream())
    other = state | {"order": json.dumps(json.loads(state["order"]) | {"version": 1})}
    with pytest.raises(ValueError, match="has version 1, and this is 2"):
        open_lanes(stream(), [0], other)
    del state["lane/000002"]
    with pytest.raises(
        ValueError, match="lane/000002: the saved data position has 4 items and not"
    ):
        open_lanes(stream(), [1, 2], state)


# Three sequences of 10 tokens in four lanes: 120 tokens.
_PAST = (50, {"code": 3})


@pytest.mark.parametrize(
    "schedule",
    [(_PAST,), (_PAST, (120, {"code": 0})), (_PAST, (130, {"docs": 9}), (140, {"docs": 1}))],
)
def test_changes_to_come_may_be_others(schedule: tuple[tuple[int, dict[str, int]], ...]) -> None:
    state = saved(stream(schedule=[_PAST, (500, {"docs": 2})]))
    [lane] = open_lanes(stream(schedule=schedule), [3], state)
    lane.next_sequence()  # the rest of a document that was drawn before
    drawn = [piece.source for _ in range(40) for piece in lane.next_sequence() if not piece.start]
    shares = {1: 3 / 4, 2: 0.0, 3: 3 / 4}
    assert drawn.count(0) / len(drawn) == pytest.approx(shares[len(schedule)], abs=0.1)


@pytest.mark.parametrize(
    "schedule", [(), ((50, {"code": 2}),), ((40, {"code": 3}),), (_PAST, (119, {"docs": 9}))]
)
def test_changes_in_the_past_must_stay(schedule: tuple[tuple[int, dict[str, int]], ...]) -> None:
    state = saved(stream(schedule=[_PAST, (500, {"docs": 2})]))
    with pytest.raises(ValueError, match=r"120 tokens were trained on .* from tokens=120 on"):
        open_lanes(stream(schedule=schedule), [3], state)


@pytest.mark.slow
def test_state_is_small_late_in_a_large_run() -> None:
    """1,024 lanes x 4 sources of a billion documents each, at 15 trillion tokens."""

    class Many(FakeDocuments):
        def __len__(self) -> int:
            return 10**9

        def num_tokens(self, document: int) -> int:
            return 5_000 + document % 3_000

        def spans(self, document: int) -> Sequence[Span]:
            return ()

        def read(self, document: int) -> Content:
            return Content(np.zeros(1, np.uint32))

    documents = {name: Many([]) for name in ("books", "code", "docs", "web")}
    weights = {"books": 50, "code": 300, "docs": 150, "web": 500}
    of = make_stream(documents, weights=weights, num_lanes=1024, sequence_length=4096)
    tokens = 15 * 10**12
    state = save_lanes(of, open_lanes(of, range(1024), None))
    state["order"] = json.dumps(json.loads(state["order"]) | {"progress": [tokens, 0]})
    for index, key in enumerate(owned_items(1024, 0, 1)[1:]):
        lane = json.loads(state[key])
        lane[2] = [tokens // 1024 // 6500 * weight // 1000 + index for weight in weights.values()]
        lane[3] = [[index % 4, 10**9 - 1 - index, 4096]]
        state[key] = json.dumps(lane, separators=(",", ":"))
    lanes = open_lanes(of, range(1024), state)
    assert save_lanes(of, lanes) == state
    assert len(json.dumps(state)) < 100_000
