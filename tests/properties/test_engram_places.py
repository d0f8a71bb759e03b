"""Places and subtrees of tokens against their definitions, for every rank of a layout."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ContextSplit
from parallel.engram_places import place_bits, subtree_levels, token_places
from parallel.runs import part_runs


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["zigzag", "contiguous"]),
)
def test_places_are_distinct_and_levels_are_the_largest(
    context: int, tensor: int, piece: int, data: int, each: int, kind: ContextSplit
) -> None:
    length, total = 2 * context * tensor * piece, data * each
    owner: dict[int, int] = {}
    level: dict[int, int] = {}
    ranks = [(d, c, t) for d in range(data) for c in range(context) for t in range(tensor)]
    for rank, (d, c, t) in enumerate(ranks):
        runs = part_runs(length, (c, context), (t, tensor), kind)
        sequences = range(d * each, (d + 1) * each)
        places = token_places(runs, length, sequences)
        assert np.all(np.diff(places) > 0)
        found = subtree_levels(runs, length, sequences, total)
        owner |= dict.fromkeys(places.tolist(), rank)
        level |= zip(places.tolist(), found.tolist(), strict=True)
    bits = place_bits(length)
    assert owner.keys() == {s << bits | p for s in range(total) for p in range(length)}
    top = max(owner).bit_length()
    for place, rank in owner.items():

        def whole(height: int, place: int = place, rank: int = rank) -> bool:
            inside = (other for other in owner if other >> height == place >> height)
            return all(owner[other] == rank for other in inside)

        assert whole(level[place])
        assert level[place] >= top or not whole(level[place] + 1)
