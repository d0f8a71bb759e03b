"""Places of tokens on ranks against counting: every place once, and everything where it should be."""

from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.config import ContextSplit
from parallel.runs import (
    Exchange,
    Runs,
    chunks,
    context_runs,
    joined,
    length_problem,
    part_runs,
    reaching_back,
    spans,
)
from parallel.sequence import SequencePart, SequenceSplit

KINDS: st.SearchStrategy[ContextSplit] = st.sampled_from(["zigzag", "contiguous"])


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int, ContextSplit]:
    """Length, context-parallel ranks, tensor-parallel ranks and kind that fit."""
    context, tensor, kind = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(KINDS)
    pieces = context * tensor * (2 if kind == "zigzag" and context > 1 else 1)
    return pieces * draw(st.integers(1, 5)), context, tensor, kind


def parts_of(split: tuple[int, int, int, ContextSplit]) -> list[SequencePart]:
    """The parts of all ranks; without groups, which only communication needs."""
    length, context, tensor, kind = split
    return [
        SequencePart(SequenceSplit(kind=kind), length, (c, context), (t, tensor))
        for c in range(context)
        for t in range(tensor)
    ]


def places(runs: Runs) -> list[int]:
    return list(chain(*runs))


@settings(max_examples=60, deadline=None)
@given(splits())
def test_every_place_is_on_exactly_one_rank(split: tuple[int, int, int, ContextSplit]) -> None:
    length, context, tensor, kind = split
    parts = parts_of(split)
    assert sorted(chain(*(places(part.runs) for part in parts))) == list(range(length))
    for rank, part in enumerate(parts):
        assert part.rank == rank
        assert part.num_tokens == len(places(part.runs)) == length // (context * tensor)
        assert part.num_queries == len(places(part.query_runs)) == length // context
        assert part.runs == part_runs(
            length, (rank // tensor, context), (rank % tensor, tensor), kind
        )
        assert joined(part.runs) == part.runs
        assert part.is_whole == (len(parts) == 1)


@settings(max_examples=60, deadline=None)
@given(splits())
def test_queries_are_the_parts_of_the_tensor_parallel_ranks_one_after_the_other(
    split: tuple[int, int, int, ContextSplit],
) -> None:
    tensor, parts = split[2], parts_of(split)
    for part in parts:
        group = parts[part.rank // tensor * tensor :][:tensor]
        queries = places(part.query_runs)
        assert queries == list(chain(*(places(other.runs) for other in group)))
        assert queries[part.own_queries] == places(part.runs)


@settings(max_examples=60, deadline=None)
@given(splits())
def test_zigzag_gives_every_context_parallel_rank_as_many_query_key_pairs(
    split: tuple[int, int, int, ContextSplit],
) -> None:
    length, context, _, kind = split
    pairs = [
        sum(place + 1 for place in places(context_runs(length, (rank, context), kind)))
        for rank in range(context)
    ]
    if kind == "zigzag":
        assert len(set(pairs)) == 1
    else:
        assert pairs == sorted(pairs)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 4), KINDS)
def test_a_length_without_a_problem_divides_and_every_fix_works(
    length: int, context: int, tensor: int, kind: ContextSplit
) -> None:
    problem = length_problem(length, context, tensor, kind, "path")
    halves = 2 if kind == "zigzag" and context > 1 else 1
    assert (problem is None) == (
        length % halves == 0 and length // halves % (context * tensor) == 0
    )
    if problem:
        assert problem.startswith(f"path={length}: must be a multiple of ")
        _, _, fix = problem.rpartition("; use ")
        for word in fix.split(" or "):
            assert length_problem(int(word), context, tensor, kind) is None


RUNS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=4)


def runs_of(gaps_and_lengths: list[tuple[int, int]]) -> Runs:
    found, place = [], 0
    for gap, length in gaps_and_lengths:
        found.append(range(place + gap, place + gap + length))
        place += gap + length
    return tuple(found)


@settings(max_examples=100, deadline=None)
@given(RUNS, st.integers(1, 9), st.integers(0, 15))
def test_chunks_cover_the_runs_and_know_where_their_history_is(
    drawn: list[tuple[int, int]], size: int, history: int
) -> None:
    runs = runs_of(drawn)
    in_order, held = places(runs), places(reaching_back(runs, history))
    done = 0
    for rows, start, end, shift in chunks(runs, size, history):
        assert rows.start == done < rows.stop
        done = rows.stop
        assert in_order[rows] == list(range(start, end))
        assert start // size == (end - 1) // size
        assert end % size == 0 or any(run.stop == end for run in runs)
        first = max(0, start - history)
        assert held[first + shift : end + shift] == list(range(first, end))
    assert done == len(in_order)
    for run, row, seen, held_row in spans(runs, history):
        assert in_order[row : row + len(run)] == list(run)
        assert held[held_row : held_row + len(seen)] == list(seen)
        assert seen == range(max(0, run.start - history), run.stop)


@st.composite
def wishes(draw: st.DrawFn) -> tuple[tuple[int, int, int, ContextSplit], list[Runs]]:
    """A split, and some places that each rank wants, several times perhaps."""
    length, context, tensor, kind = draw(splits())
    wanted = st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), max_size=3)
    return (length, context, tensor, kind), [
        tuple(range(start, min(start + count, length)) for start, count in draw(wanted))
        for _ in range(context * tensor)
    ]


@settings(max_examples=100, deadline=None)
@given(wishes())
def test_an_exchange_brings_every_rank_what_it_wants(
    wish: tuple[tuple[int, int, int, ContextSplit], list[Runs]],
) -> None:
    split, wanted = wish
    held = [part.runs for part in parts_of(split)]
    ranks = range(len(held))
    plans = [Exchange.plan(held, wanted, rank) for rank in ranks]
    own = [places(runs) for runs in held]
    for rank, plan in enumerate(plans):
        result = [-1] * plan.num_rows
        for to, rows in plan.kept:
            result[to] = own[rank][rows]
        assert plan.sent[rank] == plan.received[rank] == ()
        for source in ranks:
            arrives = list(chain(*(own[source][rows] for rows in plans[source].sent[rank])))
            for to in plan.received[source]:
                count = to.stop - to.start
                result[to], arrives = arrives[:count], arrives[count:]
            assert not arrives
        assert result == places(wanted[rank])


@settings(max_examples=40, deadline=None)
@given(splits(), st.integers(1, 12))
def test_a_history_moves_no_more_than_the_places_before_the_runs(
    split: tuple[int, int, int, ContextSplit], history: int
) -> None:
    parts = parts_of(split)
    held = [part.runs for part in parts]
    wanted = [reaching_back(runs, history) for runs in held]
    for rank, runs in enumerate(held):
        plan = Exchange.plan(held, wanted, rank)
        moved = sum(rows.stop - rows.start for rows in chain(*plan.received))
        assert moved <= history * len(runs)
