"""Compression of a document's tokens to fewer entries, by blocks; called by `compressed`.

arXiv 2606.19348, section 2.3: the pooling of CSA (eq. 9-12) and of HCA (eq. 20-23). In a packed
sequence every document is compressed as if it were alone, and a tail shorter than a block is dropped.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from train.model.attention.blocks import OwnBlocks
from train.model.attention.indexer import widen
from train.model.norm import RMSNorm
from train.model.rotary import Tables, rotate_last


class SlotPool(nn.Module):
    """Mean of a block's tokens, weighted by channel: `sum_j softmax_j(gate_j + logits_j) * kv_j`.

    With overlap there are two series of half the channels each: the first joins the entry of the
    next block, and the softmax runs over both blocks' slots. Computed in fp32 or wider; the slots'
    own logits stay fp32, as in DeepSeek's code.
    """

    def __init__(self, ratio: int, channels: int, overlap: bool) -> None:
        super().__init__()
        self.overlap = overlap
        self.logits = nn.Parameter(torch.empty(ratio, channels))

    def forward(
        self,
        kv: Float[Tensor, "batch own ratio channels"],
        gate: Float[Tensor, "batch own ratio channels"],
        follows: Bool[Tensor, "batch own"],
    ) -> Float[Tensor, "batch own width"]:
        """One row per block, in the type of `kv`; see `Blocks.follows`."""
        values, logits = widen(kv), widen(gate) + self.logits
        if self.overlap:
            values = _with_previous(values, follows, 0.0)
            logits = _with_previous(logits, follows, float("-inf"))
        return (logits.softmax(dim=2) * values).sum(dim=2).to(kv.dtype)


def _with_previous(
    series: Float[Tensor, "batch entries ratio channels"],
    follows: Bool[Tensor, "batch entries"],
    missing: float,
) -> Float[Tensor, "batch entries slots width"]:
    """The previous block's first series, then the block's own second one."""
    previous, own = series.chunk(2, dim=-1)
    previous = previous.roll(1, dims=1).masked_fill(~follows[..., None, None], missing)
    return torch.cat([previous, own], dim=2)


class Compressor(nn.Module):
    """Tokens to entries: `R(norm(pool(kv x, gate x)))`, at the position of a block's first token.

    Args:
        hidden_size: width of the tokens.
        width: width of an entry.
        ratio: tokens of a block.
        overlap: an entry also pools the block before (CSA).
        eps: of the norm.
    """

    def __init__(
        self, hidden_size: int, width: int, ratio: int, *, overlap: bool, eps: float
    ) -> None:
        super().__init__()
        channels = 2 * width if overlap else width
        self.kv = nn.Linear(hidden_size, channels, bias=False)
        self.gate = nn.Linear(hidden_size, channels, bias=False)
        self.pool = SlotPool(ratio, channels, overlap)
        self.norm = RMSNorm(width, eps)

    def forward(
        self, x: Float[Tensor, "batch part hidden"], blocks: OwnBlocks, tables: Tables
    ) -> Float[Tensor, "batch entries width"]:
        """One entry per block of the whole sequence; the rotary tables are those of the own blocks.

        Communication: of the projections of the few tokens before each run, see
        `SequencePart.with_history`; and the entries.
        """
        rows = blocks.part.with_history(blocks.history, self.kv(x), self.gate(x))
        kv, gate = map(blocks.tokens, rows)
        pooled = self.norm(self.pool(kv, gate, blocks.follows))
        return blocks.gather(rotate_last(pooled.unsqueeze(2), *tables).squeeze(2))
