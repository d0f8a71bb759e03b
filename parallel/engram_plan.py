"""What a step needs of Engram's tables: made from row ids alone, ahead of time and without a rank's help.

`train.memory` (or a worker of the loader) plans, `parallel.engram_service` carries it out. The rows
of all tables are numbered one behind the other, and row r lives on rank `r % ranks` as its local
row `r // ranks`: any part of a table is spread evenly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32, Int64
from numpy.typing import NDArray

from parallel.compiled import compiled


@dataclass(frozen=True)
class StepPlan:
    """The rows that the tokens of one rank read in a step; arrays of numpy, so it pickles."""

    rows: NDArray[np.int64]
    """`[unique]` global rows, each once, grouped by owner."""
    inverse: NDArray[np.int32]
    """`[tokens, columns]` index into `rows`."""
    splits: NDArray[np.int64]
    """`[ranks]` how many of `rows` each rank owns."""
    places: NDArray[np.int64]
    """`[tokens]` where in the global batch each token is, see `token_places`."""
    limits: NDArray[np.int8]
    """`[tokens]` how far this rank may sum gradients by itself, see `subtree_limits`."""


def plan_step(
    ids: Int64[np.ndarray, "tokens columns"],
    places: Int64[np.ndarray, "tokens"],
    limits: Int8[np.ndarray, "tokens"],
    *,
    num_rows: int,
    ranks: int,
) -> StepPlan:
    """Find the distinct rows of a rank's tokens and who owns them; linear in the ids.

    Args:
        ids: global rows that each token reads; tokens in any order, none is fine.
        places: of the tokens, as `token_places` gives them.
        limits: of the tokens, as `subtree_limits` gives them.
        num_rows: of all tables together.
        ranks: that share the tables.

    Raises:
        IndexError: an id is not a row; names the first one and its token.
    """
    wrong = (ids < 0) | (ids >= num_rows)
    if wrong.any():
        token, column = (int(i[0]) for i in np.nonzero(wrong))
        raise IndexError(
            f"Engram row {ids[token, column]} (token {token}, column {column}) is outside the"
            f" tables, which have {num_rows} rows"
        )
    rows, inverse = distinct(ids.reshape(-1))
    order, starts = group_by((rows % ranks).astype(np.int32), ranks)
    moved = np.empty(len(rows), np.int32)
    moved[order] = np.arange(len(rows), dtype=np.int32)
    inverse = moved[inverse].reshape(ids.shape)
    return StepPlan(rows[order], inverse, np.diff(starts), places, limits)


def token_places(
    sequences: Int64[np.ndarray, "*tokens"],
    positions: Int64[np.ndarray, "*tokens"],
    sequence_length: int,
) -> Int64[np.ndarray, "*tokens"]:
    """Places of tokens in the global batch: leaves of the tree in which gradients are summed.

    A sequence takes a power of two of places, so that it is a subtree. Places beyond its length do
    not exist.

    Args:
        sequences: indices in the global batch.
        positions: in the sequence.
        sequence_length: in tokens, of all sequences.
    """
    places: NDArray[np.int64] = (sequences << _position_bits(sequence_length)) | positions
    return places


def subtree_limits(
    places: Int64[np.ndarray, "tokens"], *, num_sequences: int, sequence_length: int
) -> Int8[np.ndarray, "tokens"]:
    """How far a rank that holds some tokens can follow the tree of the global batch by itself.

    A subtree of level l holds the places that differ in their lowest l bits only. If all places of
    it that exist are this rank's, no other rank adds to its sum. It depends on the layout alone, so
    one result serves all steps; the cost is that of sorting the rank's places.

    Args:
        places: of this rank's tokens, in any order.
        num_sequences: of the global batch.
        sequence_length: in tokens.

    Returns:
        For each token, the level of the largest subtree around it that is all this rank's.

    Raises:
        ValueError: a place does not exist, or occurs twice.
    """
    bits = _position_bits(sequence_length)
    _check_places(places, num_sequences, sequence_length, bits)
    order = np.argsort(places)
    ascending = places[order]
    limits = np.zeros(len(places), np.int8)
    for level in range(1, bits + (num_sequences - 1).bit_length() + 1):
        subtrees = ascending >> level
        first = np.flatnonzero(np.append(True, subtrees[1:] != subtrees[:-1])[: len(places)])
        held = np.diff(np.append(first, len(places)))
        start = subtrees[first] << level
        whole = held == _existing(start, level, num_sequences, sequence_length, bits)
        if not whole.any():
            break  # a larger subtree contains this one
        limits[order[np.repeat(whole, held)]] = level
    return limits


def distinct(
    ids: Int64[np.ndarray, "ids"],
) -> tuple[Int64[np.ndarray, "unique"], Int32[np.ndarray, "ids"]]:
    """The distinct ids in the order of first appearance, and the index of each id among them."""
    unique, inverse = np.empty(len(ids), np.int64), np.empty(len(ids), np.int32)
    number = _distinct(ids, unique, inverse)
    return unique[:number].copy(), inverse


def group_by(
    groups: Int32[np.ndarray, "items"],
    num_groups: int,
    visit: Int64[np.ndarray, "items"] | None = None,
) -> tuple[Int64[np.ndarray, "items"], Int64[np.ndarray, "bounds"]]:
    """Items sorted by group (counting sort), in one group as they are visited, by default in order.

    Returns:
        Indices of the items, and where in these each group starts (one more than there are groups).
    """
    visit = np.arange(len(groups)) if visit is None else visit
    order, starts = np.empty(len(groups), np.int64), np.zeros(num_groups + 1, np.int64)
    _group(groups, visit, order, starts)
    return order, starts


def _position_bits(sequence_length: int) -> int:
    return (sequence_length - 1).bit_length()


def _check_places(
    places: NDArray[np.int64], num_sequences: int, sequence_length: int, bits: int
) -> None:
    sequences, positions = places >> bits, places & ((1 << bits) - 1)
    wrong = (sequences < 0) | (sequences >= num_sequences) | (positions >= sequence_length)
    if wrong.any():
        token = int(wrong.argmax())
        raise ValueError(
            f"token {token} is at position {positions[token]} of sequence {sequences[token]}, but"
            f" the batch has {num_sequences} sequences of {sequence_length} tokens"
        )
    if len(np.unique(places)) < len(places):
        raise ValueError("two tokens of a rank have the same place in the global batch")


def _existing(
    start: NDArray[np.int64], level: int, num_sequences: int, sequence_length: int, bits: int
) -> NDArray[np.int64]:
    """How many places of the subtrees that begin at `start` there are in the global batch."""
    existing: NDArray[np.int64]
    if level <= bits:
        existing = np.minimum(sequence_length - (start & ((1 << bits) - 1)), 1 << level)
    else:
        sequences = np.minimum(num_sequences - (start >> bits), 1 << (level - bits))
        existing = sequences * sequence_length
    return existing


@compiled
def _distinct(ids: NDArray[Any], unique: NDArray[Any], inverse: NDArray[Any]) -> int:
    """Number of distinct ids; by a hash table of which at most half is in use."""
    bits = 1
    while (1 << bits) < 2 * len(ids):
        bits += 1
    keys, indices = np.full(1 << bits, -1, np.int64), np.empty(1 << bits, np.int32)
    number, last = 0, (1 << bits) - 1
    for i in range(len(ids)):
        key = ids[i]
        # Fibonacci hashing: the high bits of the product with 2^64 / golden ratio.
        slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
        while keys[slot] != -1 and keys[slot] != key:
            slot = (slot + 1) & last
        if keys[slot] == -1:
            keys[slot], indices[slot], unique[number] = key, number, key
            number += 1
        inverse[i] = indices[slot]
    return number


@compiled
def _group(
    groups: NDArray[Any], visit: NDArray[Any], order: NDArray[Any], starts: NDArray[Any]
) -> None:
    """`starts` is zero at first; while items are set down, entry g + 1 is the next free one of g."""
    for i in range(len(groups)):
        if groups[i] + 2 < len(starts):
            starts[groups[i] + 2] += 1
    for g in range(2, len(starts)):
        starts[g] += starts[g - 1]
    for i in range(len(visit)):
        order[starts[groups[visit[i]] + 1]] = visit[i]
        starts[groups[visit[i]] + 1] += 1
