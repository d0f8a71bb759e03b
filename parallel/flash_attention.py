"""Causal attention within documents by torch's FlashAttention; see `parallel.backend.kernels`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary

from parallel.config import FLASH_MAX_HEAD_DIM

DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(query and key [batch seq heads qk_dim], value [batch seq heads v_dim], document ids [batch seq],
scale) -> [batch seq heads v_dim], of whole sequences in bf16 or fp16."""

REFERENCE: DenseAttention | None = None
"""The model's own code."""

_DTYPES = (torch.bfloat16, torch.float16)


class _Documents(NamedTuple):
    """Where the documents of a batch lie in its tokens, one sequence after the other."""

    bounds: Int[Tensor, "documents_plus_1"]
    longest: int


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Documents of the batches that are in use: all layers ask for the same ones, and finding them waits
for the device."""


def computes(dtype: torch.dtype, qk_dim: int, value: torch.Size) -> bool:
    """Whether there is a kernel for such keys, and values of a shape; else the reference computes."""
    return dtype in _DTYPES and max(qk_dim, value[-1]) <= FLASH_MAX_HEAD_DIM and value.numel() > 0


def flash_attention(
    query: Float[Tensor, "batch seq heads qk_dim"],
    key: Float[Tensor, "batch seq heads qk_dim"],
    value: Float[Tensor, "batch seq heads v_dim"],
    document_ids: Int[Tensor, "batch seq"],
    scale: float,
) -> Float[Tensor, "batch seq heads v_dim"]:
    """`softmax(scale * query key^T) value` over the earlier tokens of the same document and itself.

    Probabilities are fp32 inside and never leave the chip. The backward pass sums in a fixed order
    where torch is told to be deterministic. No cost for hidden documents.

    Args:
        query: of a type and width that `computes` accepts.
        key: one per token.
        value: may be narrower or wider than the keys.
        document_ids: document of each token; the tokens of one are neighbours.
        scale: factor on the scores.
    """
    bounds, longest = _documents(document_ids)
    width = max(query.shape[-1], value.shape[-1])
    width += -width % 8  # what the kernel wants of rows
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).flatten(0, 1) for x in (query, key, value))
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor), "no auxiliary result was asked for"
    return out[..., : value.shape[-1]].view(value.shape)


def _documents(document_ids: Int[Tensor, "batch seq"]) -> _Documents:
    """Find where they begin; a sequence always begins one."""
    known: _Documents | None = _known.get(document_ids)  # type: ignore[no-untyped-call]
    if known is None:
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        bounds = F.pad(starts, (0, 1), value=document_ids.numel()).int()
        known = _Documents(bounds, int(bounds.diff().max()))
        _known[document_ids] = known
    return known
