"""Sums of the gradients of table rows that come out the same, bit for bit, in every layout.

`parallel.engram_service` sums with it, first on the rank that has the gradients, then on the owner.

A token's place in the global batch is a leaf of a binary tree (`engram_plan.token_places`). The
gradient of a row is the sum over this tree of its occurrences: a node is the sum of its two halves,
and a half without occurrences is skipped. So what is added to what depends on the places alone, not on
who holds the tokens. For two neighbours of ascending places, the highest bit in which they differ
is the level of the node that joins them; lower levels are added first, so a stack of partial sums
does it in one pass.

A rank sums inside the largest subtrees that are all its own (`engram_plan.subtree_limits`) and
sends each of these partial sums with one place in it. The owner sees subtrees in place of leaves and
goes on by the same rule.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int8, Int32, Int64
from numpy.typing import NDArray

from parallel.compiled import compiled
from parallel.engram_plan import group_by


@dataclass(frozen=True)
class SumOrder:
    """Which terms are added up to which results."""

    terms: Int64[np.ndarray, "terms"]
    """Indices of the terms by result; of one result, in ascending order of their places."""
    places: Int64[np.ndarray, "terms"]
    """Of these terms."""
    starts: Int64[np.ndarray, "bounds"]
    """Where in `terms` those of each result begin; one more than there are results."""

    @property
    def results(self) -> int:
        """How many sums there are; each has a term."""
        return len(self.starts) - 1

    @property
    def first_places(self) -> Int64[np.ndarray, "results"]:
        """A place in each result's subtree."""
        places: NDArray[np.int64] = self.places[self.starts[:-1]]
        return places


def order_partial_sums(
    inverse: Int32[np.ndarray, "tokens columns"],
    places: Int64[np.ndarray, "tokens"],
    limits: Int8[np.ndarray, "tokens"],
    num_rows: int,
) -> tuple[SumOrder, Int64[np.ndarray, "results"]]:
    """What a rank may add up: occurrences of a row in one subtree that is all this rank's.

    Args:
        inverse: row of each occurrence; an occurrence is an entry of this, counted row-major.
        places: of the tokens.
        limits: of the tokens.
        num_rows: that `inverse` refers to; each occurs.

    Returns:
        The order, and the row of each partial sum (ascending).
    """
    columns = inverse.shape[1]
    visit = (np.argsort(places)[:, None] * columns + np.arange(columns)).reshape(-1)
    terms, starts = group_by(inverse.reshape(-1), num_rows, visit)
    place, limit = places[terms // columns], limits[terms // columns]
    begins = np.ones(len(terms), np.bool_)
    begins[1:] = (place[1:] ^ place[:-1]) >> limit[1:] != 0
    begins[starts[:-1]] = True
    first = np.flatnonzero(begins)
    rows = inverse.reshape(-1)[terms[first]].astype(np.int64)
    return SumOrder(terms, place, np.append(first, len(terms))), rows


def order_sums(
    rows: Int32[np.ndarray, "terms"], places: Int64[np.ndarray, "terms"], num_rows: int
) -> SumOrder:
    """The order in which an owner adds up the partial sums that it got from all ranks.

    Args:
        rows: of the partial sums.
        places: one in the subtree of each.
        num_rows: that `rows` refers to; each occurs.
    """
    terms, starts = group_by(rows, num_rows, np.argsort(places, kind="stable"))
    return SumOrder(terms, places[terms], starts)


def tree_sum(
    values: Float[np.ndarray, "values width"], order: SumOrder
) -> Float[np.ndarray, "results width"]:
    """Add up the terms of each result over the tree of their places, in the precision of `values`."""
    out = np.empty((order.results, values.shape[1]), values.dtype)
    _tree_sum(np.ascontiguousarray(values), order.terms, order.places, order.starts, out)
    return out


def sum_of_squares(values: Float[np.ndarray, "rows width"]) -> float:
    """In fp64, row after row."""
    return float(_sum_of_squares(values))


@compiled
def _tree_sum(
    values: NDArray[Any],
    terms: NDArray[Any],
    places: NDArray[Any],
    starts: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Entry i of the stack is joined to the one below it at the level `joins[i]`, these falling.

    Levels are compared by the xor of the two places itself: no two on the stack have the same highest
    bit, since the left half of a node comes before its right one. (Equal places join at once.)
    """
    stack, joins = np.empty((65, values.shape[1]), values.dtype), np.empty(65, np.int64)
    for result in range(len(starts) - 1):
        top = 0
        _copy(values, terms[starts[result]], stack, 0)
        for i in range(starts[result] + 1, starts[result + 1]):
            join = places[i] ^ places[i - 1]
            while top > 0 and joins[top] <= join:
                top = _join(stack, top)
            top += 1
            joins[top] = join
            _copy(values, terms[i], stack, top)
        while top > 0:
            top = _join(stack, top)
        _copy(stack, 0, out, result)


@compiled
def _copy(source: NDArray[Any], row: int, target: NDArray[Any], to: int) -> None:
    for d in range(source.shape[1]):
        target[to, d] = source[row, d]


@compiled
def _join(stack: NDArray[Any], top: int) -> int:
    for d in range(stack.shape[1]):
        stack[top - 1, d] += stack[top, d]
    return top - 1


@compiled
def _sum_of_squares(values: NDArray[Any]) -> float:
    total = 0.0
    for row in range(values.shape[0]):
        of_row = 0.0
        for d in range(values.shape[1]):
            of_row += np.float64(values[row, d]) * np.float64(values[row, d])
        total += of_row
    return total
