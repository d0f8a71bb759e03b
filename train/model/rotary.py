"""Rotary position embedding and its extension by YaRN; called by the attention files.

Real arithmetic in fp32: complex numbers and fp64 do not exist on every accelerator.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.model.attention.config import YarnConfig

Tables = tuple[Float[Tensor, "batch _ pairs"], Float[Tensor, "batch _ pairs"]]
"""Cosine and sine of the angles of some tokens."""


def rotary_tables(
    position_ids: Int[Tensor, "batch seq *pairs"],
    width: int,
    theta: float,
    yarn: YarnConfig | None = None,
) -> Tables:
    """Cosine and sine of `position * theta^(-2i/width)` for each pair i (arXiv 2104.09864, eq. 15).

    Args:
        position_ids: position of each token within its document; or one for each pair of its
            channels, see `axis_positions`.
        width: number of rotated channels, even.
        theta: base of the frequencies.
        yarn: extension of the context. It changes the frequencies and scales both tables by
            `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`, which is 1 in
            DeepSeek-V3; attention must scale its scores by `softmax_correction` as well.

    Returns:
        Two fp32 tables, one column per pair of channels.
    """
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    frequencies = theta**-exponents
    positions = position_ids if position_ids.ndim == 3 else position_ids.unsqueeze(-1)
    if yarn is None:
        angles = positions.float() * frequencies
        return angles.cos(), angles.sin()
    angles = positions.float() * stretch(frequencies, theta, yarn)
    scale = _temperature(yarn, yarn.mscale) / _temperature(yarn, yarn.mscale_all_dim)
    return angles.cos() * scale, angles.sin() * scale


def stretch(
    frequencies: Float[Tensor, "pairs"], theta: float, yarn: YarnConfig
) -> Float[Tensor, "pairs"]:
    """YaRN's frequencies: slow ones divided by `factor`, fast ones kept, a linear ramp between.

    "NTK-by-parts" of arXiv 2309.00071, section 3.2. As in DeepSeek's code the ramp runs over whole
    pairs, between those that turn `beta_fast` and `beta_slow` times within the original context.
    """
    pairs = len(frequencies)

    def pair_that_turns(times: float) -> float:
        period = yarn.original_max_position_embeddings / (2 * math.pi * times)
        return pairs * math.log(period) / math.log(theta)

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), 2 * pairs - 1)
    index = torch.arange(pairs, device=frequencies.device, dtype=torch.float32)
    # A ramp of no width is a step.
    slow = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow)


def softmax_correction(yarn: YarnConfig | None) -> float:
    """Factor on attention's scores: `(0.1 mscale_all_dim ln(factor) + 1)^2`, 1 without YaRN.

    Queries and keys would each be scaled by the root of it: all channels, also those without
    positions, which DeepSeek-V3 does here instead of in the tables.
    """
    return 1.0 if yarn is None else _temperature(yarn, yarn.mscale_all_dim) ** 2


def _temperature(yarn: YarnConfig, mscale: float) -> float:
    """`0.1 mscale ln(factor) + 1` (arXiv 2309.00071, eq. 22, with DeepSeek's weight)."""
    return 0.1 * mscale * math.log(yarn.factor) + 1.0


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
    DeepSeek's main attention; see `rotate_halves` for the other.
    """
    rotated: Tensor = _Rotate.apply(x, cos.unsqueeze(2), sin.unsqueeze(2))  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """The gradient is turned back: half the work of going through every product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return pairs.flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back: Tensor = _Rotate.apply(grad, cos, -sin)  # type: ignore[no-untyped-call]
        return back, None, None


def rotate_halves(
    x: Float[Tensor, "batch seq heads width"],
    cos: Float[Tensor, "batch seq pairs"],
    sin: Float[Tensor, "batch seq pairs"],
) -> Float[Tensor, "batch seq heads width"]:
    """The same for the pairs (0, w/2), (1, w/2 + 1), ...: the layout of DeepSeek-V3.2's indexer."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    halves = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(halves, dim=-1).to(x.dtype)


def rotate_last(
    x: Float[Tensor, "batch seq heads width"],
    cos: Float[Tensor, "batch seq pairs"],
    sin: Float[Tensor, "batch seq pairs"],
) -> Float[Tensor, "batch seq heads width"]:
    """`rotate` of the last channels of every head, as many as the tables have; the others stay."""
    kept, turned = x.tensor_split([x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([kept, rotate(turned, cos, sin)], dim=-1)
