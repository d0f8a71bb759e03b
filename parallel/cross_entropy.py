"""Cross-entropy over a vocabulary that is here or spread over ranks; called by `train.step`.

The reference: without fp32 copies of all logits. Tensor-parallel ranks hold consecutive equal pieces
of the vocabulary. For a token with logits z, of which rank r holds z_r and the label y among them:

    log softmax(z)[y] = log softmax(z_r)[y] + log w_r       w_r = sum exp(z_r) / sum exp(z)
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import gather_ranks

CrossEntropy = Callable[[Tensor, Tensor, dist.ProcessGroup | None], Tensor]
"""(logits [batch queries vocab], labels [batch queries], group) -> a rank's share of the loss: see
`summed_cross_entropy`, and `parallel.backend.kernels` for the others."""


def summed_cross_entropy(
    logits: Float[Tensor, "batch queries vocab"],
    labels: Int[Tensor, "batch queries"],
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy summed over the valid labels (>= 0), computed in fp32 or wider.

    Chunked over tokens, softmax recomputed in backward: beside the logits and their gradient it
    needs memory for one chunk only.

    With a group it is this rank's share of that: the sum over the labels that are in its piece of
    the vocabulary. The shares add up, and the gradient is that of the whole sum.

    Communication: over `group`, an all-gather of one number per token.

    Args:
        logits: of this rank's piece of the vocabulary.
        labels: token ids.
        group: ranks that hold the pieces, for the same tokens; None: the whole vocabulary is here.
    """
    total: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), group)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    """`sum_t -log softmax(z_t)[label_t]`, with gradient `softmax(z_t) - onehot(label_t)`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rank, vocab = (0 if group is None else group.rank()), logits.shape[1]
        valid, mine = labels >= 0, labels // vocab == rank
        chosen = torch.where(mine, labels - rank * vocab, 0).unsqueeze(-1)
        likelihood = torch.empty(len(labels), dtype=wide, device=logits.device)
        for rows in _chunks(logits):
            log_softmax = torch.log_softmax(logits[rows], dim=-1, dtype=wide)
            likelihood[rows] = log_softmax.gather(-1, chosen[rows]).squeeze(-1)
        log_weight = None
        if group is not None:
            log_normaliser = logits.gather(-1, chosen).squeeze(-1).to(wide) - likelihood
            log_weight = log_normaliser - gather_ranks(log_normaliser, group, "tp").logsumexp(0)
            likelihood += log_weight
        ctx.save_for_backward(logits, valid, mine, chosen, log_weight)
        return -(likelihood * mine).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, valid, mine, chosen, log_weight = ctx.saved_tensors
        scale = (grad * valid).unsqueeze(-1)
        one = mine.to(grad.dtype).unsqueeze(-1)
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            softmax = torch.softmax(logits[rows], dim=-1, dtype=grad.dtype)
            if log_weight is not None:
                softmax *= log_weight[rows].exp().unsqueeze(-1)
            softmax.scatter_add_(-1, chosen[rows], -one[rows])
            torch.mul(softmax, scale[rows], out=result[rows])
        return result, None, None


def _chunks(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Tokens that are computed together.

    On a processor their fp32 logits stay in the cache of a core; elsewhere they are enough to hide
    the launch of an operation.
    """
    elements = 2**18 if logits.device.type == "cpu" else 2**28
    size = max(1, elements // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
