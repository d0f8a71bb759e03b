"""Rotary position embedding on interleaved pairs; called by the attention files.

Real arithmetic in fp32: complex numbers and fp64 do not exist on every accelerator.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_tables(
    position_ids: Int[Tensor, "batch seq *pairs"], width: int, theta: float
) -> tuple[Float[Tensor, "batch seq pairs"], Float[Tensor, "batch seq pairs"]]:
    """Cosine and sine of `position * theta^(-2i/width)` for each pair i (arXiv 2104.09864, eq. 15).

    Args:
        position_ids: position of each token within its document; or one for each pair of its
            channels, see `axis_positions`.
        width: number of rotated channels, even.
        theta: base of the frequencies.

    Returns:
        Two fp32 tables, one column per pair of channels.
    """
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    positions = position_ids if position_ids.ndim == 3 else position_ids.unsqueeze(-1)
    angles = positions.float() * theta**-exponents
    return angles.cos(), angles.sin()


def axis_positions(
    positions: Int[Tensor, "batch seq axes"], sections: Sequence[int]
) -> Int[Tensor, "batch seq pairs"]:
    """Position by which each rotary pair turns, when a token has one on each of several axes.

    Pairs are dealt to the axes in turn until each has its share, so that every axis gets low and
    high frequencies: the interleaved form of multimodal rotary embedding (Qwen3-VL, arXiv
    2511.21631). A token with equal positions is turned as in one dimension, bit by bit.

    Args:
        positions: of each token on each axis.
        sections: pairs of each axis.
    """
    left, axes = list(sections), list[int]()
    while any(left):
        turn = [axis for axis, pairs in enumerate(left) if pairs]
        left = [max(0, pairs - 1) for pairs in left]
        axes += turn
    return positions[..., torch.tensor(axes, device=positions.device)]


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
