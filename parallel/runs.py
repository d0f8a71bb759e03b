"""Places of a sequence's tokens: which rank has which, and how loops go over them. Pure arithmetic.

A run is a `range` of neighbouring places. The tokens of a rank are a few runs, one after the other in
its tensors; `sequence` moves them. No torch: `launch.validate` asks for `length_problem`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.config import ContextSplit

Runs = tuple[range, ...]


def length_problem(
    length: int,
    context: int,
    tensor: int,
    kind: ContextSplit,
    path: str = "data.sequence_length",
) -> str | None:
    """What is wrong with sequences of `length` tokens on `context` x `tensor` ranks, if anything."""
    pieces = context * tensor * (2 if kind == "zigzag" and context > 1 else 1)
    if length % pieces == 0:
        return None
    below = length - length % pieces
    fits = f"{below} or {below + pieces}" if below else str(pieces)
    return (
        f"{path}={length}: must be a multiple of {pieces} with "
        f"parallel.context_parallel_size={context} (parallel.context_split={kind}) and "
        f"parallel.tensor_parallel_size={tensor}; use {fits}"
    )


def context_runs(length: int, cp: tuple[int, int], kind: ContextSplit) -> Runs:
    """Places of the tokens of a context-parallel rank, in order.

    Args:
        length: tokens of the sequence.
        cp: rank and number of ranks.
        kind: contiguous, or zigzag: causal attention of early tokens costs less, so each rank gets
            the i-th and the i-th last of twice as many pieces.
    """
    rank, size = cp
    if kind == "contiguous" or size == 1:
        piece = length // size
        return (range(rank * piece, (rank + 1) * piece),)
    piece, last = length // (2 * size), 2 * size - 1 - rank
    return joined(
        [range(rank * piece, (rank + 1) * piece), range(last * piece, (last + 1) * piece)]
    )


def part_runs(length: int, cp: tuple[int, int], tp: tuple[int, int], kind: ContextSplit) -> Runs:
    """Places of the tokens of one rank: the tp-th equal piece of its context-parallel rank's."""
    rank, size = tp
    width = length // cp[1] // size
    start, end, before, found = rank * width, (rank + 1) * width, 0, []
    for run in context_runs(length, cp, kind):
        inside = run[max(0, start - before) : max(0, end - before)]
        if len(inside):
            found.append(inside)
        before += len(run)
    return tuple(found)


def joined(runs: Sequence[range]) -> Runs:
    """Neighbouring runs as one."""
    found: list[range] = []
    for run in runs:
        if found and found[-1].stop == run.start:
            found[-1] = range(found[-1].start, run.stop)
        else:
            found.append(run)
    return tuple(found)


def reaching_back(runs: Sequence[range], history: int) -> Runs:
    """Every run with the `history` places before it, fewer at the start of the sequence."""
    return tuple(range(max(0, run.start - history), run.stop) for run in runs)


class Span(NamedTuple):
    """A run in a tensor of several, and in one of the runs `reaching_back`."""

    run: range
    row: int
    """Where it begins in the tensor of the runs."""
    held: range
    """Places of the run and what it looks back at."""
    held_row: int
    """Where those begin in the other tensor."""


def spans(runs: Sequence[range], history: int = 0) -> Iterator[Span]:
    """Where each run is.

    Args:
        runs: in the order of the tensor.
        history: places that they look back at.
    """
    row, held_row = 0, 0
    for run, held in zip(runs, reaching_back(runs, history), strict=True):
        yield Span(run, row, held, held_row)
        row, held_row = row + len(run), held_row + len(held)


class Chunk(NamedTuple):
    """Neighbouring tokens that are computed together."""

    rows: slice
    """Where they are in a tensor of the runs."""
    start: int
    """Place of the first in the sequence."""
    end: int
    """One behind the place of the last."""
    shift: int
    """Row in a tensor of the runs `reaching_back`, minus place, of all that the chunk's run holds."""


def chunks(runs: Sequence[range], size: int, history: int = 0) -> Iterator[Chunk]:
    """Cut runs at the multiples of `size`, which are the same places on whichever rank.

    Args:
        runs: in the order of the tensor.
        size: most tokens of a chunk.
        history: places that the runs look back at.
    """
    for run, row, held, held_row in spans(runs, history):
        start = run.start
        while start < run.stop:
            end = min((start // size + 1) * size, run.stop)
            rows = slice(row + start - run.start, row + end - run.start)
            yield Chunk(rows, start, end, held_row - held.start)
            start = end


@dataclass(frozen=True)
class Exchange:
    """What one rank keeps, sends and receives so that every rank gets the places that it wants.

    All slices are rows: of the tensor of the rank's own tokens, or of its result, which holds the
    places that it wants in their order.
    """

    num_rows: int
    """Rows of the result."""
    kept: tuple[tuple[slice, slice], ...]
    """Rows of the result, and the own rows that they are."""
    sent: tuple[tuple[slice, ...], ...]
    """Own rows that each rank gets, in order; the rank itself none."""
    received: tuple[tuple[slice, ...], ...]
    """Rows of the result that come from each rank, in the order in which it sends them."""

    @classmethod
    def plan(cls, held: Sequence[Runs], wanted: Sequence[Runs], rank: int) -> "Exchange":
        """For one of the ranks; all ranks plan alike.

        Args:
            held: places of the tokens of every rank, each place on one rank.
            wanted: places that every rank is to get, any number of times each.
            rank: the one to plan for.
        """
        table = sorted(_holdings(held))
        pieces = [list(_pieces(runs, table)) for runs in wanted]
        ranks = range(len(held))
        mine = pieces[rank]
        others = [source for source in ranks if source != rank]
        return cls(
            num_rows=sum(map(len, wanted[rank])),
            kept=tuple((piece.result, piece.rows) for piece in mine if piece.source == rank),
            sent=tuple(
                tuple(p.rows for p in pieces[to] if p.source == rank) if to in others else ()
                for to in ranks
            ),
            received=tuple(
                tuple(p.result for p in mine if p.source == source) if source in others else ()
                for source in ranks
            ),
        )


class _Holding(NamedTuple):
    start: int
    stop: int
    rank: int
    row: int


class _Piece(NamedTuple):
    source: int
    rows: slice
    """Of the source's tensor."""
    result: slice


def _holdings(held: Sequence[Runs]) -> Iterator[_Holding]:
    for rank, runs in enumerate(held):
        row = 0
        for run in runs:
            yield _Holding(run.start, run.stop, rank, row)
            row += len(run)


def _pieces(wanted: Runs, table: Sequence[_Holding]) -> Iterator[_Piece]:
    """Who has the wanted places, in their order."""
    done = 0
    for run in wanted:
        start = run.start
        while start < run.stop:
            found = table[bisect_right(table, start, key=lambda holding: holding.start) - 1]
            count, row = min(run.stop, found.stop) - start, found.row + start - found.start
            yield _Piece(found.rank, slice(row, row + count), slice(done, done + count))
            start, done = start + count, done + count
