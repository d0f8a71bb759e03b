"""Which experts a token id is sent to by hash routing; called by `router`. Pure numpy."""

import numpy as np
from numpy.typing import NDArray


def token_expert_table(
    vocab_size: int, num_experts: int, k: int, *, seed: int, layer_index: int
) -> NDArray[np.int64]:
    """Distinct experts of every token id, evenly spread (V4, arXiv 2606.19348, section 2.1).

    V4 predefines the table and publishes no rule for it; its checkpoints carry theirs. Here token
    i of a block of `num_experts` consecutive ids goes to `p[(i + d_j) mod num_experts]`, j < k, with
    a random permutation p and k distinct random shifts d per block. So each expert has exactly k ids
    of every whole block. Ids of a byte-pair vocabulary are ordered by frequency, hence each expert
    also has its share of the frequent ones.

    Args:
        vocab_size: rows of the table.
        num_experts: at least `k`.
        k: experts of a token.
        seed: of the model; the same on every rank.
        layer_index: makes the layers differ.

    Returns:
        Expert numbers, [vocab_size, k].
    """
    generator = np.random.default_rng([seed, layer_index])
    blocks = -(-vocab_size // num_experts)
    ordered = np.tile(np.arange(num_experts), (blocks, 1))
    permutation = generator.permuted(ordered, axis=1)
    shifts = generator.permuted(ordered, axis=1)[:, None, :k]
    places = (np.arange(num_experts)[:, None] + shifts) % num_experts
    table: NDArray[np.int64] = permutation[np.arange(blocks)[:, None, None], places]
    return table.reshape(-1, k)[:vocab_size]
