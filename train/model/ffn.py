"""SwiGLU feed-forward network: the dense blocks and the shared expert; `swiglu` also serves the experts."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def swiglu(
    gate: Float[Tensor, "*batch intermediate"],
    up: Float[Tensor, "*batch intermediate"],
    limit: float | None,
) -> Float[Tensor, "*batch intermediate"]:
    """`silu(gate) * up` (arXiv 2002.05202), both clamped first as in DeepSeek-V4 (arXiv 2606.19348).

    Args:
        gate: clamped from above only: silu is bounded below.
        up: clamped on both sides.
        limit: the clamp; None for the SwiGLU of V3 and of shared experts.
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """`down(swiglu(gate(x), up(x)))`.

    Gate and up are two matrices: tensor parallelism cuts each by rows, which a fused one would
    turn into all gates on one rank and all ups on the other.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
        limit: see `swiglu`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """Apply to every token."""
        hidden: Tensor = self.down(swiglu(self.gate(x), self.up(x), self.limit))
        return hidden
