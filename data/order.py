"""The order of documents, as pure functions of integers: a keyed permutation and a weighted mixture.

`data.lanes` asks here which source comes next and which of its documents. Nothing is shuffled in a
buffer and no order is stored, so resuming at any draw costs the same as starting. Imports neither
torch nor numpy.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

_ROUNDS = 6
_UINT64 = (1 << 64) - 1


@lru_cache(maxsize=4096)
def round_keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    """Keys of one permutation, a hash of what names it; the same on every machine and version."""
    name = f"{seed}/{stream}/{epoch}".encode()
    return struct.unpack(f"<{_ROUNDS}Q", blake2b(name, digest_size=8 * _ROUNDS).digest())


def permute(position: int, size: int, keys: tuple[int, ...]) -> int:
    """Image of `position` under a pseudo-random permutation of `range(size)`.

    A Feistel network over the smallest power of two that holds `size`, walked along its cycle until
    it lands inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002):
    under two evaluations on average and no memory, whatever the size.

    Args:
        position: 0 <= position < size.
        size: number of elements, at most 2**64.
        keys: from `round_keys`.
    """
    assert 0 <= position < size, (position, size)
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        high, low = position >> low_bits, position & low_mask
        for round_number in range(0, _ROUNDS, 2):
            high ^= _mix(low, keys[round_number]) & high_mask
            low ^= _mix(high, keys[round_number + 1]) & low_mask
        position = high << low_bits | low
        if position < size:
            return position


def _mix(value: int, key: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
    value = (value + key) & _UINT64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _UINT64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _UINT64
    return value ^ value >> 31


def draw_source(weights: Sequence[int], credit: list[int]) -> int:
    """Choose the source of the next draw and update `credit` in place.

    A source earns its weight at every draw and pays the sum of the weights when it is chosen.
    Among those whose credit is positive, the one that would first owe a whole draw is chosen:
    earliest deadline first on the windows of Pfair scheduling (Baruah et al., 1996). From zero
    credit, after any number t of draws every source was chosen within 1 of t * weight / sum.

    Args:
        weights: positive integers.
        credit: integers that sum to 0, one per source; the whole state.

    Returns:
        Index of the source; the lowest index wins a tie.
    """
    total = sum(weights)
    chosen, earliest = -1, 0
    for source, weight in enumerate(weights):
        credit[source] += weight
        if credit[source] > 0:
            deadline = -((credit[source] - total) // weight)
            if chosen < 0 or deadline < earliest:
                chosen, earliest = source, deadline
    credit[chosen] -= total
    return chosen


def credit_after(weights: Sequence[int], draws: int) -> list[int]:
    """Credit after `draws` draws from zero; the schedule repeats after sum(weights) draws."""
    credit = [0] * len(weights)
    for _ in range(draws % sum(weights)):
        draw_source(weights, credit)
    return credit
