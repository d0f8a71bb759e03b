"""RMSNorm, the only normalisation of the model; called by every block, by MLA, Engram and MTP."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim (Zhang and Sennrich, arXiv 1910.07467).

    The mean square is accumulated in fp32 whatever the type of `x`.

    Args:
        size: width of the last dim.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalise `x`; the result has its type."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
