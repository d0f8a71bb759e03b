"""Rules of lanes, and a lane against a stream that is written out in full."""

import json
import subprocess
import sys
from itertools import accumulate, chain
from pathlib import Path

import pytest

from data.lanes import Lane, Span, Stream, check_lanes, lane_range, owned_lanes


class Lengths(list[int]):
    """Documents of given lengths."""

    def num_tokens(self, document: int) -> int:
        return self[document]


def stream(**changes: object) -> Stream:
    fields: dict[str, object] = {
        "names": ("code", "docs"),
        "weights": (2, 1),
        "documents": (Lengths([5, 9, 30, 2]), Lengths([7, 1, 12])),
        "split": "train",
        "seed": 1,
        "sequence_length": 10,
        "num_lanes": 4,
        **changes,
    }
    return Stream(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", [0, 1, 3])
def test_spans_are_the_documents_cut_every_sequence_length(lane: int) -> None:
    """Whole documents from a lane with one endless sequence, cut with a running sum instead."""
    [whole] = [Lane(stream(sequence_length=400), lane).next_sequence()]
    ends = list(accumulate(span.stop for span in whole))
    expected: list[list[Span]] = [[] for _ in range(40)]
    for span, end in zip(whole, ends, strict=True):
        begin = end - span.stop
        for row in range(40):
            start, stop = max(begin, row * 10), min(end, row * 10 + 10)
            if start < stop:
                piece = Span(span.source, span.document, start - begin, stop - begin)
                expected[row].append(piece)
    cut = Lane(stream(), lane)
    assert [cut.next_sequence() for _ in range(40)] == expected


def test_lanes_begin_with_different_sources() -> None:
    firsts = [Lane(stream(num_lanes=6), lane).next_sequence()[0].source for lane in range(6)]
    assert sorted(firsts) == [0, 0, 0, 0, 1, 1]


def test_seed_and_split_change_the_order() -> None:
    def order(**changes: object) -> list[list[Span]]:
        lane = Lane(stream(documents=(Lengths([3] * 50), Lengths([3] * 50)), **changes), 0)
        return [lane.next_sequence() for _ in range(20)]

    assert order() == order()
    assert order() != order(seed=2)
    assert order() != order(split="validation")


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2}, {"num_lanes": 2}, {"weights": (3, 1)}, {"names": ("code", "text")}],
)
def test_state_of_another_order_is_refused(changes: dict[str, object]) -> None:
    lane = Lane(stream(), 0)
    lane.next_sequence()
    Lane(stream(), 0, lane.state())
    with pytest.raises(ValueError, match="lane/000000: the saved position belongs to another"):
        Lane(stream(**changes), 0, lane.state())


def test_state_of_another_version_is_refused() -> None:
    state = json.loads(Lane(stream(), 0).state()) | {"version": 2}
    with pytest.raises(ValueError, match="belongs to another order"):
        Lane(stream(), 0, json.dumps(state))


@pytest.mark.parametrize(("lanes", "size"), [(8, 1), (8, 4), (12, 3), (5, 5)])
def test_ranks_share_the_lanes_in_order(lanes: int, size: int) -> None:
    shares = [list(lane_range(lanes, rank, size)) for rank in range(size)]
    assert list(chain(*shares)) == list(range(lanes))
    assert owned_lanes(8, 1, 4) == ["lane/000002", "lane/000003"]


@pytest.mark.parametrize(
    ("batch", "size", "lanes", "problems"),
    [
        (16, 4, None, []),
        (16, 4, 8, []),
        (64, 1, 64, []),
        (10, 4, None, ["train.global_batch_size=10: .* use 8 or 12"]),
        (2, 4, None, ["train.global_batch_size=2: .* use 4$"]),
        (16, 4, 12, ["data.num_lanes=12: .* use 8 or 16"]),
        (16, 8, 4, [r"parallel.data_parallel_size\*data_replicate=8: .* use 4$"]),
        (12, 5, 5, ["data.num_lanes=5: must divide train.global_batch_size=12; use null, and"]),
        (
            12,
            3,
            8,
            [
                "data.num_lanes=8: .* use 6 or 12",
                r"data_parallel_size\*data_replicate=3: .* 2 or 4",
            ],
        ),
        (0, 1, None, ["must be at least 1"]),
        (4, 1, 0, ["data.num_lanes=0: must be at least 1"]),
    ],
)
def test_rules(batch: int, size: int, lanes: int | None, problems: list[str]) -> None:
    found = check_lanes(batch, size, lanes)
    assert len(found) == len(problems)
    for text, pattern in zip(found, problems, strict=True):
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(text)


def test_rules_need_neither_torch_nor_numpy() -> None:
    code = "import sys, data.lanes, data.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
