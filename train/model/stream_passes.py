"""The passes over the residual streams that a hyper-connection makes; called by `hyper_connection`.

Each function reads or writes the streams of all tokens once, in the type that they come in; small
maps are fp32 or wider. They stand here twice, with equal results up to rounding: as products and
elementwise operations of PyTorch, which run everywhere, and written out over the streams, so that
`torch.compile` makes one loop of each. Without the compiler the written-out form would be slower
than the products. No gradients flow through them: `hyper_connection` holds the calculus.

T tokens, n streams, C wide:  x, g [T, n, C];  f [T, C];  read, post [T, n];  res [T, n, n].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from train.model.sinkhorn import project_backward, project_forward


@dataclass(frozen=True)
class Passes:
    """One form of all passes."""

    read: Callable[[Tensor, Tensor], Tensor]
    """(x, read) -> sum_i read_i x_i"""
    read_grad: Callable[[Tensor, Tensor], Tensor]
    """(x, df) -> d read_i = x_i . df"""
    write: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x, f, post, res) -> res x + post f"""
    write_grad: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(g, x, f, post) -> df = post^T g, d post_i = g_i . f, d res_ij = g_i . x_j"""
    stream_grad: Callable[..., Tensor]
    """(g, df, x, *, read, res, shrink) -> res^T g + read df + shrink x"""
    mean_square: Callable[[Tensor], Tensor]
    """x -> mean of the squares over streams and width"""
    maps: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    """`manifold_maps`"""
    maps_grad: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    """`manifold_maps_grad`"""


def wide_type(x: Tensor) -> torch.dtype:
    """The type of maps and sums: fp32, or fp64 for fp64 streams."""
    return torch.promote_types(x.dtype, torch.float32)


def manifold_maps(
    product: Float[Tensor, "tokens maps"],
    scale: Float[Tensor, "tokens"],
    alpha: Float[Tensor, "3"],
    bias: Float[Tensor, "maps"],
    num_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps of mHC (arXiv 2512.24880, eq. 7-8) from `phi vec(x)` and `1 / rms(vec(x))`.

    Returns:
        `phi x'`, tokens last in memory, for `manifold_maps_grad`; then pre, post and res.
    """
    projected = (product * scale.unsqueeze(1)).t().contiguous()
    n = math.isqrt(len(bias) + 1) - 1  # 2n + n^2 maps
    pre, post, res = _logits(projected, alpha, bias, n)
    res = project_forward(res.reshape(n, n, -1), num_iterations)
    return (
        projected,
        torch.sigmoid(pre).t().contiguous(),
        2 * torch.sigmoid(post).t().contiguous(),
        res.permute(2, 0, 1).contiguous(),
    )


def manifold_maps_grad(
    projected: Float[Tensor, "maps tokens"],
    scale: Float[Tensor, "tokens"],
    alpha: Float[Tensor, "3"],
    bias: Float[Tensor, "maps"],
    *,
    grad_pre: Float[Tensor, "tokens streams"],
    grad_post: Float[Tensor, "tokens streams"],
    grad_res: Float[Tensor, "tokens streams streams"],
    num_iterations: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `product`, the coefficient of x, and the gradients of alpha and bias.

    With y = (phi x) s and s = (|x|^2/m + eps)^(-1/2): dx = phi^T (dy s) - (dy . y) s^2/m x, where m
    is `width`, n C. The last factor of x is the coefficient that is returned.
    """
    n = grad_pre.shape[1]
    pre, post, res = _logits(projected, alpha, bias, n)
    pre, post = torch.sigmoid(pre), torch.sigmoid(post)
    grad_logits = torch.cat(
        [
            grad_pre.t() * pre * (1 - pre),
            2 * grad_post.t() * post * (1 - post),
            project_backward(
                res.reshape(n, n, -1), grad_res.permute(1, 2, 0).contiguous(), num_iterations
            ).flatten(0, 1),
        ]
    )
    per_map = (grad_logits * projected).sum(1)
    grad_alpha = torch.stack([part.sum() for part in torch.split(per_map, [n, n, n * n])])
    grad = grad_logits * _per_map(alpha, n).unsqueeze(1)
    shrink = -(grad * projected).sum(0) * scale**2 / width
    return (grad * scale).t().contiguous(), shrink, grad_alpha, grad_logits.sum(1)


def _per_map(alpha: Tensor, n: int) -> Tensor:
    """Alpha of every row of phi: n for pre, n for post, n^2 for res."""
    return torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])


def _logits(
    projected: Tensor, alpha: Tensor, bias: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`alpha * (phi x') + b`, for pre, post and res; tokens last."""
    logits = projected * _per_map(alpha, n).unsqueeze(1) + bias.unsqueeze(1)
    return logits[:n], logits[n : 2 * n], logits[2 * n :]


def _read(x: Tensor, read: Tensor) -> Tensor:
    return torch.bmm(read.to(x.dtype).unsqueeze(1), x).squeeze(1)


def _read_grad(x: Tensor, df: Tensor) -> Tensor:
    return _dot(df, x).to(wide_type(x))


def _write(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    mixed = torch.bmm(res.to(x.dtype), x)
    return mixed.addcmul_(post.to(x.dtype).unsqueeze(2), f.unsqueeze(1))


def _write_grad(g: Tensor, x: Tensor, f: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    df = torch.bmm(post.to(g.dtype).unsqueeze(1), g).squeeze(1)
    d_post = _dot(f, g)
    d_res = torch.bmm(g, x.transpose(1, 2))
    return df, d_post.to(post.dtype), d_res.to(post.dtype)


def _dot(f: Tensor, x: Tensor) -> Tensor:
    """`f . x_i`. On the CPU a row times a matrix is 2-4 times as fast as a matrix times a column."""
    return torch.bmm(f.unsqueeze(1), x.transpose(1, 2)).squeeze(1)


def _stream_grad(
    g: Tensor, df: Tensor, x: Tensor, *, read: Tensor, res: Tensor, shrink: Tensor | None
) -> Tensor:
    # On the CPU, products with strided small matrices copy them one by one.
    grad = torch.bmm(res.to(g.dtype).transpose(1, 2).contiguous(), g)
    grad.addcmul_(read.to(g.dtype).unsqueeze(2), df.unsqueeze(1))
    if shrink is not None:
        grad.addcmul_(x, shrink.to(g.dtype)[:, None, None])
    return grad


def _mean_square(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=wide_type(x))
    return norm**2 / flat.shape[1]


def _fused_read(x: Tensor, read: Tensor) -> Tensor:
    return _combine(read, x.to(wide_type(x))).to(x.dtype)


def _fused_read_grad(x: Tensor, df: Tensor) -> Tensor:
    wide = wide_type(x)
    return (x.to(wide) * df.to(wide).unsqueeze(1)).sum(2)


def _fused_write(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    wide = wide_type(x)
    wide_x, wide_f = x.to(wide), f.to(wide)
    rows = [
        _combine(row, wide_x) + weight.unsqueeze(1) * wide_f
        for row, weight in zip(res.unbind(1), post.unbind(1), strict=True)
    ]
    return torch.stack(rows, 1).to(x.dtype)


def _fused_write_grad(
    g: Tensor, x: Tensor, f: Tensor, post: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_type(x)
    wide_g, wide_x, wide_f = g.to(wide), x.to(wide), f.to(wide)
    df = _combine(post, wide_g).to(f.dtype)
    d_post = (wide_g * wide_f.unsqueeze(1)).sum(2)
    return df, d_post, (wide_g.unsqueeze(2) * wide_x.unsqueeze(1)).sum(3)


def _fused_stream_grad(
    g: Tensor, df: Tensor, x: Tensor, *, read: Tensor, res: Tensor, shrink: Tensor | None
) -> Tensor:
    wide = wide_type(g)
    wide_g, wide_df = g.to(wide), df.to(wide)
    columns = []
    for j, (column, weight) in enumerate(zip(res.unbind(2), read.unbind(1), strict=True)):
        grad = _combine(column, wide_g) + weight.unsqueeze(1) * wide_df
        if shrink is not None:
            grad = grad + shrink.unsqueeze(1) * x[:, j].to(wide)
        columns.append(grad)
    return torch.stack(columns, 1).to(g.dtype)


def _fused_mean_square(x: Tensor) -> Tensor:
    return x.to(wide_type(x)).square().flatten(1).mean(1)


def _combine(weights: Tensor, x: Tensor) -> Tensor:
    """`sum_i weights_i x_i` per token, written out."""
    total = weights[:, :1] * x[:, 0]
    for i in range(1, x.shape[1]):
        total = total + weights[:, i : i + 1] * x[:, i]
    return total


EAGER = Passes(
    read=_read,
    read_grad=_read_grad,
    write=_write,
    write_grad=_write_grad,
    stream_grad=_stream_grad,
    mean_square=_mean_square,
    maps=manifold_maps,
    maps_grad=manifold_maps_grad,
)


@cache
def fused() -> Passes:
    """The compiled form. Nothing is compiled before the first call of each pass.

    `fullgraph` makes a pass that cannot be compiled, or was compiled for too many shapes, an error
    instead of a silent return to the interpreter.
    """
    return Passes(
        read=torch.compile(_fused_read, fullgraph=True),
        read_grad=torch.compile(_fused_read_grad, fullgraph=True),
        write=torch.compile(_fused_write, fullgraph=True),
        write_grad=torch.compile(_fused_write_grad, fullgraph=True),
        stream_grad=torch.compile(_fused_stream_grad, fullgraph=True),
        mean_square=torch.compile(_fused_mean_square, fullgraph=True),
        maps=torch.compile(manifold_maps, fullgraph=True),
        maps_grad=torch.compile(manifold_maps_grad, fullgraph=True),
    )
