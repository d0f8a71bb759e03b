"""Places of a rank's tokens in the global batch, and what of it the rank can sum alone: arithmetic.

A row's gradient is a sum over the binary tree of places (`parallel.engram_tree`). A rank may add its
own occurrences up to the largest subtrees of which it has every token; above them only the row's
owner adds. So a place and a level go with every token to the plan of a step; `train.memory` asks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parallel.runs import joined


def place_bits(length: int) -> int:
    """Bits of a place that say where in a sequence of `length` tokens it is."""
    return (length - 1).bit_length()


def token_places(
    runs: Sequence[range], length: int, sequences: range
) -> NDArray[np.int64]:  # shape [tokens]
    """Place `sequence << place_bits | position` of every token of a rank, ascending.

    Args:
        runs: places in a sequence of the tokens that the rank has of each.
        length: tokens of a sequence.
        sequences: of the global batch, those of this rank.
    """
    positions = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    first = np.arange(sequences.start, sequences.stop, dtype=np.int64) << place_bits(length)
    return np.asarray((first[:, None] | positions).reshape(-1), dtype=np.int64)


def subtree_levels(
    runs: Sequence[range], length: int, sequences: range, num_sequences: int
) -> NDArray[np.int8]:  # shape [tokens]
    """Level of the largest subtree around every token of a rank of which it has all tokens.

    A subtree of level l holds the places that agree in all but their last l bits; not all of these
    exist, for neither lengths nor numbers of sequences need be powers of two.

    Args:
        runs: places in a sequence of the tokens that the rank has of each.
        length: tokens of a sequence.
        sequences: of the global batch, those of this rank.
        num_sequences: of the global batch.
    """
    own = joined(runs)
    within = np.concatenate([_levels(run, length) for run in own])
    if own != (range(length),):
        return np.tile(within, len(sequences))
    return np.repeat(place_bits(length) + _levels(sequences, num_sequences), length).astype(np.int8)


def _levels(own: range, size: int) -> NDArray[np.int8]:
    """Level of the largest aligned block around each of the places `own` whose places below `size`
    are all among `own`.
    """
    places = np.arange(own.start, own.stop)
    levels = np.zeros(len(own), np.int8)
    for level in range(1, place_bits(size) + 1):
        first = places >> level << level
        # A block is inside the next larger one, so levels that fit come first.
        levels += (first >= own.start) & (np.minimum(first + (1 << level), size) <= own.stop)
    return levels
