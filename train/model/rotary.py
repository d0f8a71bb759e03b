"""Rotary position embedding on interleaved pairs; called by the attention files.

Real arithmetic in fp32: complex numbers and fp64 do not exist on every accelerator.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_tables(
    position_ids: Int[Tensor, "batch seq"], width: int, theta: float
) -> tuple[Float[Tensor, "batch seq pairs"], Float[Tensor, "batch seq pairs"]]:
    """Cosine and sine of `position * theta^(-2i/width)` for each pair i (arXiv 2104.09864, eq. 15).

    Args:
        position_ids: position of each token within its document.
        width: number of rotated channels, even.
        theta: base of the frequencies.

    Returns:
        Two fp32 tables, one column per pair of channels.
    """
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    angles = position_ids[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch seq heads width"],
    cos: Float[Tensor, "batch seq pairs"],
    sin: Float[Tensor, "batch seq pairs"],
) -> Float[Tensor, "batch seq heads width"]:
    """Rotate the channel pairs (0, 1), (2, 3), ... of every head by the angle of its position.

    Computed in fp32 or wider and returned in the type of `x`. Interleaved pairs are the layout of
    DeepSeek's main attention; the half-split layout of other models is a permutation of channels.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)
