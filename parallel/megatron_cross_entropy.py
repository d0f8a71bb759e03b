"""Cross-entropy over a vocabulary that is spread over ranks, computed by megatron-core.

Other implementations of `parallel.cross_entropy`, with the same arguments and result. They compute
in fp32 whatever the logits are, and keep the softmax of all tokens in fp32 for the backward pass: 4
bytes per logit of this rank. Of `group` they ask three all-reduces of one number per token.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.traffic import count_sent
from parallel.volume import sum_bytes


def summed_cross_entropy(
    logits: Float[Tensor, "batch queries vocab"],
    labels: Int[Tensor, "batch queries"],
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """This rank's share of the loss: see `parallel.cross_entropy.summed_cross_entropy`.

    megatron-core's own entry point asks for its global state; its steps do not, and are put together
    here as it does.

    Raises:
        ValueError: the logits are fp64.
    """
    if logits.dtype == torch.float64:
        raise ValueError(
            "parallel.kernels.cross_entropy=megatron: computes in fp32, and the logits are fp64; use "
            "reference"
        )
    total: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), group)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        rank, vocab = (0 if group is None else group.rank()), logits.shape[1]
        # Their steps overwrite the logits that they are given.
        wide = logits.to(torch.float32, copy=True)
        wide, largest = VocabParallelCrossEntropy.calculate_logits_max(wide)
        _reduce(largest, dist.ReduceOp.MAX, group)
        elsewhere, chosen, predicted, total, exponentials = (
            VocabParallelCrossEntropy.calculate_predicted_logits(
                wide, labels, largest, rank * vocab, (rank + 1) * vocab
            )
        )
        _reduce(predicted, dist.ReduceOp.SUM, group)
        _reduce(total, dist.ReduceOp.SUM, group)
        softmax, losses = VocabParallelCrossEntropy.calculate_cross_entropy_loss(
            exponentials, predicted, total
        )
        ctx.save_for_backward(softmax, labels >= 0, elsewhere, chosen)
        ctx.dtype = logits.dtype
        share: Tensor = (losses * ~elsewhere).sum()
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, valid, elsewhere, chosen = ctx.saved_tensors
        operands = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(
            softmax, elsewhere
        )
        grad_2d, rows, update, result = operands
        result = VocabParallelCrossEntropy.calculate_gradients(
            grad_2d, rows, chosen, update, result, grad * valid
        )
        return result.to(ctx.dtype), None, None


def fused_cross_entropy(
    logits: Float[Tensor, "batch queries vocab"],
    labels: Int[Tensor, "batch queries"],
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """The same compiled into a few kernels, with two all-reduces; the gradient is bf16.

    Raises:
        ValueError: the logits are not bf16, or the vocabulary is not spread over ranks.
    """
    if logits.dtype != torch.bfloat16 or group is None:
        raise ValueError(
            "parallel.kernels.cross_entropy=megatron_fused: its gradient is bf16 and its sums are over "
            "tensor-parallel ranks, of which it needs two; use reference, or train.dtype=bf16 and "
            "parallel.tensor_parallel_size=2"
        )
    vocab = logits.shape[-1]
    losses = fused_vocab_parallel_cross_entropy(logits.flatten(0, 1), labels.flatten(), group)
    count_sent("tp", 3 * sum_bytes(losses.nbytes, group.size()))
    valid, mine = labels.flatten() >= 0, labels.flatten() // vocab == group.rank()
    # The value is that of this rank's labels, the gradient that of all.
    value = losses.detach()
    share: Tensor = (value * mine + (losses - value) * valid).sum()
    return share


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        count_sent("tp", sum_bytes(x.nbytes, group.size()))
        dist.all_reduce(x, op=op, group=group)
