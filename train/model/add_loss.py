"""How a loss that is made inside the model joins the gradient, and is counted; for router and indexers.

Such a loss is not returned: nothing between the layer and `train.step` has to carry it. Whoever
adds one scales it by the step's rule first: the sum over this rank's own tokens or sequences, over
the number of those in the whole global batch.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def add_loss(x: Float[Tensor, "*shape"], loss: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """`x` itself; a backward pass through the result also sends a gradient of 1 into `loss`.

    Args:
        x: something that the model's output depends on.
        loss: scaled; joins the gradient without travelling through the rest of the network.
    """
    result: Tensor = _AddLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return result


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = loss.new_ones(())
        # detach() shares the memory without being a view, of which FSDP2 warns.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.one


def on_backward(x: Float[Tensor, "*shape"], action: Callable[[], None]) -> Float[Tensor, "*shape"]:
    """`x` itself; a backward pass through the result calls `action`.

    For what is counted: backward runs once also where activation recomputation repeats the forward
    pass, and not at all in an evaluation.
    """
    result: Tensor = _OnBackward.apply(x, action)  # type: ignore[no-untyped-call]
    return result


class _OnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return grad, None
