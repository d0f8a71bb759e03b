"""Compression of a document's tokens to fewer entries, by blocks; called by `compressed`.

arXiv 2606.19348, section 2.3: the pooling of CSA (eq. 9-12) and of HCA (eq. 20-23). In a packed
sequence every document is compressed as if it were alone, and a tail shorter than a block is dropped.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.model.attention.indexer import Visibility, widen
from train.model.norm import RMSNorm
from train.model.rotary import rotate_last


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of `ratio` tokens lie; a sequence has at most seq // ratio.

    Entry i is the i-th block of its sequence; the unused ones come last and read the first tokens.
    """

    ratio: int
    last: Int[Tensor, "batch entries"]
    """Place of the last token of the block."""
    documents: Int[Tensor, "batch entries"]
    """Document of the block; -1 where there is none."""
    follows: Bool[Tensor, "batch entries"]
    """Whether the entry before it is the block before it in the same document."""

    @classmethod
    def of(
        cls,
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        ratio: int,
    ) -> "Blocks":
        """Find them.

        Args:
            position_ids: place of each token in its document, from 0.
            document_ids: document of each token.
            ratio: tokens of a block; 0 makes no blocks.
        """
        if not ratio:
            none = document_ids[:, :0]
            return cls(1, none, none, none.bool())
        seq = document_ids.shape[1]
        places = torch.arange(seq, device=document_ids.device)
        ends = torch.where((position_ids + 1) % ratio == 0, places, seq)
        last = ends.sort(dim=1).values[:, : seq // ratio]
        unused = last == seq
        last = last.masked_fill(unused, ratio - 1)
        documents = document_ids.gather(1, last).masked_fill(unused, -1)
        follows = torch.zeros_like(unused)
        follows[:, 1:] = documents[:, 1:] == documents[:, :-1]
        return cls(ratio, last, documents, follows)

    def visibility(self, document_ids: Int[Tensor, "batch seq"]) -> Visibility:
        """An entry is seen from the last token of its block on: token t sees (t + 1) // ratio."""
        return Visibility(document_ids, self.documents, self.last, self.ratio)

    def rows(
        self, x: Float[Tensor, "batch seq width"]
    ) -> Float[Tensor, "batch entries ratio width"]:
        """The tokens of every block."""
        batch, seq, width = x.shape
        slots = torch.arange(1 - self.ratio, 1, device=x.device)
        starts = torch.arange(batch, device=x.device)[:, None, None] * seq
        places = starts + self.last.unsqueeze(-1) + slots
        return x.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, width)

    def at_first(
        self, table: Float[Tensor, "batch seq pairs"]
    ) -> Float[Tensor, "batch entries pairs"]:
        """The row of each block's first token, whose position the entry takes."""
        first = (self.last - self.ratio + 1).unsqueeze(-1)
        return table.gather(1, first.expand(-1, -1, table.shape[-1]))


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
        kv: Float[Tensor, "batch entries ratio channels"],
        gate: Float[Tensor, "batch entries ratio channels"],
        follows: Bool[Tensor, "batch entries"],
    ) -> Float[Tensor, "batch entries width"]:
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
        self,
        x: Float[Tensor, "batch seq hidden"],
        blocks: Blocks,
        cos: Float[Tensor, "batch seq pairs"],
        sin: Float[Tensor, "batch seq pairs"],
    ) -> Float[Tensor, "batch entries width"]:
        """One entry per block; the rotary tables are those of the tokens."""
        pooled = self.pool(blocks.rows(self.kv(x)), blocks.rows(self.gate(x)), blocks.follows)
        entries = self.norm(pooled).unsqueeze(2)
        return rotate_last(entries, blocks.at_first(cos), blocks.at_first(sin)).squeeze(2)
