"""Cross-entropy without fp32 copies of all logits; called by `train.step`."""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed_cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Cross-entropy summed over the valid labels (>= 0), computed in fp32 or wider.

    Chunked over tokens, softmax recomputed in backward: beside the logits and their gradient it
    needs memory for one chunk only.
    """
    total: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten())  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    """`sum_t -log softmax(z_t)[label_t]`, with gradient `softmax(z_t) - onehot(label_t)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        valid = labels >= 0
        chosen = labels.clamp(min=0).unsqueeze(-1)
        likelihood = torch.empty(len(labels), dtype=wide, device=logits.device)
        for rows in _chunks(logits):
            log_softmax = torch.log_softmax(logits[rows], dim=-1, dtype=wide)
            likelihood[rows] = log_softmax.gather(-1, chosen[rows]).squeeze(-1)
        ctx.save_for_backward(logits, valid, chosen)
        return -(likelihood * valid).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, valid, chosen = ctx.saved_tensors
        scale = (grad * valid).unsqueeze(-1)
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            softmax = torch.softmax(logits[rows], dim=-1, dtype=grad.dtype)
            softmax.scatter_add_(-1, chosen[rows], -torch.ones_like(scale[rows]))
            torch.mul(softmax, scale[rows], out=result[rows])
        return result, None


def _chunks(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Tokens that are computed together.

    On a processor their fp32 logits stay in the cache of a core; elsewhere they are enough to hide
    the launch of an operation.
    """
    elements = 2**18 if logits.device.type == "cpu" else 2**28
    size = max(1, elements // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
