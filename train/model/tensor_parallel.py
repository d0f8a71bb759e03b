"""Which weights tensor parallelism cuts, and along which dim; named to `parallel` by `transformer`.

Cut by head: what makes queries, keys and values out of latents, and the output projection. Cut by
channel: dense feed-forward networks. Cut by token: embedding and head. Everything else stays whole:
projections to latents and the indexer are small and serve all heads, experts have ranks of their
own, and norms, residual sites, router and shared expert work on a rank's own tokens.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from train.model.attention.compressed import HybridAttention
from train.model.block import Block
from train.model.ffn import FeedForward


def column_parallel(blocks: Iterable[Block]) -> Iterator[nn.Module]:
    """Modules of blocks of which a rank computes some outputs."""
    for block in blocks:
        attention = block.attention
        if isinstance(attention, HybridAttention):
            yield from (attention.q_b, attention.sink, attention.o_a)
        else:
            yield attention.q_b if attention.q is None else attention.q
            yield attention.kv_b
        if isinstance(block.ffn, FeedForward):
            yield from (block.ffn.gate, block.ffn.up)


def row_parallel(blocks: Iterable[Block]) -> Iterator[nn.Module]:
    """Modules of blocks that sum over what other ranks' modules computed, too."""
    for block in blocks:
        attention = block.attention
        yield attention.o_b if isinstance(attention, HybridAttention) else attention.o
        if isinstance(block.ffn, FeedForward):
            yield block.ffn.down
