"""The order of documents, as pure functions of integers: keyed permutations and a weighted mixture.

`data.lanes` asks here which source comes next and which of its documents, `data.sources` which
documents are held out. Nothing is shuffled in a buffer and no order is stored, so resuming at
any draw costs the same as starting. Imports neither torch nor numpy.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import gcd

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
    low_bits, low_mask, high_mask = _halves(size)
    while True:
        high, low = position >> low_bits, position & low_mask
        for round_number in range(0, _ROUNDS, 2):
            high ^= _mix(low, keys[round_number]) & high_mask
            low ^= _mix(high, keys[round_number + 1]) & low_mask
        position = high << low_bits | low
        if position < size:
            return position


def unpermute(image: int, size: int, keys: tuple[int, ...]) -> int:
    """The position that `permute` takes to `image`: the same rounds and walk, backwards."""
    assert 0 <= image < size, (image, size)
    low_bits, low_mask, high_mask = _halves(size)
    while True:
        high, low = image >> low_bits, image & low_mask
        for round_number in range(_ROUNDS - 2, -1, -2):
            low ^= _mix(high, keys[round_number + 1]) & low_mask
            high ^= _mix(low, keys[round_number]) & high_mask
        image = high << low_bits | low
        if image < size:
            return image


def permute_blocks(
    position: int, size: int, *, seed: int, stream: str, epoch: int, block: int, window: int
) -> int:
    """Image of `position` under a permutation of `range(size)` that stays among few neighbourhoods.

    The range is cut into blocks of `block` neighbours (the last may be short), the blocks are
    permuted, and every `window` of them that then follow each other are shuffled together.
    With block=1 all of the range is one neighbourhood: `permute`.

    Args:
        position: 0 <= position < size.
        size: number of elements.
        seed: names the permutation, with stream and epoch, as in `round_keys`.
        stream: see seed.
        epoch: see seed.
        block: neighbours in a block.
        window: blocks that are shuffled together.
    """
    keys = round_keys(seed, stream, epoch)
    if block == 1:
        return permute(position, size, keys)
    blocks = -(-size // block)
    missing = blocks * block - size
    short = _slot_of_last(blocks, keys)
    number = _with_gap(position, short, block, missing) // (window * block)
    first, after = (
        min(size, at * block - (missing if short < at else 0))
        for at in (number * window, (number + 1) * window)
    )
    window_keys = round_keys(seed, f"{stream}/window {number}", epoch)
    shuffled = first + permute(position - first, after - first, window_keys)
    slot, offset = divmod(_with_gap(shuffled, short, block, missing), block)
    return permute(slot, blocks, keys) * block + offset


def skip_held_out(position: int, size: int, held: int, keys: tuple[int, ...]) -> int:
    """Element number `position` of `range(size)` without the `held` that `permute` puts first.

    Nearly every element keeps its place, so that neighbours stay neighbours. Those that the
    held-out ones leave free below size - held go to the elements from there on: each step
    follows the permutation back from a held-out element to the place that stands for it.

    Args:
        position: 0 <= position < size - held.
        size: number of elements.
        held: how many are held out, the images of 0 .. held.
        keys: from `round_keys`.
    """
    while (place := unpermute(position, size, keys)) < held:
        position = size - held + place
    return position


def draw_source(weights: Sequence[int], credit: list[int]) -> int:
    """Choose the source of the next draw and update `credit` in place.

    A source earns its weight at every draw and pays the sum of the weights when it is chosen.
    Among those whose credit is positive, the one that would first owe a whole draw is chosen:
    earliest deadline first on the windows of Pfair scheduling (Baruah et al., 1996). From zero
    credit, after any number t of draws every source was chosen within 1 of t * weight / sum.

    Args:
        weights: not negative, some positive; a source of weight 0 has credit 0 and is never chosen.
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
    """Credit after `draws` draws from zero; the schedule repeats after as many as the weights ask for."""
    credit = [0] * len(weights)
    for _ in range(draws % (sum(weights) // gcd(*weights))):
        draw_source(weights, credit)
    return credit


def _halves(size: int) -> tuple[int, int, int]:
    """Bits of the lower half of the network's numbers, and masks of the lower and upper half."""
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    return low_bits, (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1


def _mix(value: int, key: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
    value = (value + key) & _UINT64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _UINT64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _UINT64
    return value ^ value >> 31


@lru_cache(maxsize=4096)
def _slot_of_last(blocks: int, keys: tuple[int, ...]) -> int:
    """Where the permuted blocks have the last one, which may be short."""
    return unpermute(blocks - 1, blocks, keys)


def _with_gap(position: int, short: int, block: int, missing: int) -> int:
    """A position as if the block in slot `short` were not `missing` elements short."""
    return position + missing if position >= (short + 1) * block - missing else position
