"""Hyper-connections, unconstrained and manifold-constrained; built by `residual`.

    x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)        x in R^{n x C}

All parameters are used in `site(...)`; `write` needs none. At initialisation every kind computes
the plain pre-norm network. The maps are computed in fp32 or wider; the streams keep their type.

`site` and its `write` share one backward pass: see `Maps.x`.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.model.config import ModelConfig
from train.model.recompute import StreamSegment
from train.model.stream_passes import EAGER, Passes, fused, wide_type
from train.model.streams import Streams, num_streams


class Maps(NamedTuple):
    """What `write` needs: the streams that were read, and the maps of their tokens."""

    x: Float[Tensor, "batch seq streams hidden"]
    """For `write` only, exactly once, and for nothing else: the gradient that autograd carries back
    along it is that of what `write` returned. The site multiplies it by H_res^T in the same pass
    that adds the other gradients of x, which saves two passes over the streams."""
    post: Float[Tensor, "batch seq streams"]
    res: Float[Tensor, "batch seq streams streams"]
    next_read: Float[Tensor, "batch seq streams"] | None = None
    """Single-pass mHC: by which the next sub-layer reads."""
    segment: StreamSegment | None = None
    """From which `x` comes back in backward; None: it is kept."""


class _Site(nn.Module):
    """What HC and mHC share: maps of widths (n, n, n^2), weight alpha and bias of each.

    While `capture` is set, the latest forward pass leaves the residual maps of its last sequence
    for a monitor: see `take_captured`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = num_streams(config)
        self.widths = [n, n, n * n]
        self.eps = config.rms_norm_eps
        self.passes = fused() if config.hyper_connection.compile else EAGER
        self.alpha = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(sum(self.widths)))
        self.capture = False
        self._captured: tuple[Tensor, Tensor] | None = None

    def maps(
        self,
        x: Tensor,
        post: Tensor,
        res: Tensor,
        next_read: Tensor | None = None,
        segment: StreamSegment | None = None,
    ) -> Maps:
        """Hand the maps to `write`, and to a monitor if there is one."""
        if self.capture:
            streams = x.detach()[-1].to(res.dtype)
            self._captured = res.detach()[-1].clone(), streams.square().mean(dim=(1, 2))
        return Maps(x, post, res, next_read, segment)

    def take_captured(
        self,
    ) -> tuple[Float[Tensor, "seq streams streams"], Float[Tensor, "seq"]]:
        """Residual maps of the captured sequence, and mean square of the streams that were read."""
        assert self._captured is not None, "capture was not set in the last forward pass"
        captured, self._captured = self._captured, None
        return captured

    def write(self, output: Float[Tensor, "batch seq hidden"], maps: Maps) -> Streams:
        """`H_res x + H_post^T output`."""
        x = _Write.apply(self.passes, maps.segment, maps.x, output, maps.post, maps.res)  # type: ignore[no-untyped-call]
        return Streams(x, maps.next_read, maps.segment)


class HyperConnection(_Site):
    """Unconstrained hyper-connections in the form that the mHC paper compares with (its eq. 5).

        x~ = RMSNorm(x) per stream;   H = alpha * tanh(theta x~^T) + b   for pre, post and res

    theta has n + 2 rows of width C. Initial values are those of the original (arXiv 2409.19606):
    theta 0, b_post 1, b_res the identity, b_pre one-hot at `site_index` modulo n.
    """

    def __init__(self, config: ModelConfig, site_index: int) -> None:
        super().__init__(config)
        self.site_index = site_index
        self.theta = nn.Parameter(torch.empty(2 + self.widths[0], config.hidden_size))

    def forward(self, streams: Streams) -> tuple[Float[Tensor, "batch seq hidden"], Maps]:
        """The input of the sub-layer, and what `write` needs."""
        wide = wide_type(streams.x)
        normalised = F.rms_norm(streams.x.to(wide), streams.x.shape[-1:], eps=self.eps)
        gates = torch.tanh(F.linear(normalised, self.theta.to(wide)))
        b_pre, b_post, b_res = torch.split(self.bias, self.widths)
        pre = self.alpha[0] * gates[..., 0] + b_pre
        post = self.alpha[1] * gates[..., 1] + b_post
        # Entry (i, j) of the map is theta_res[i] . x~[j]; `gates` has the stream j in front.
        res = self.alpha[2] * gates[..., 2:].transpose(2, 3) + b_res.view(gates.shape[2], -1)
        layer_input, x = _Read.apply(streams.x, pre, res.detach(), self.passes)  # type: ignore[no-untyped-call]
        return layer_input, self.maps(x, post, res)


class ManifoldHyperConnection(_Site):
    """Manifold-constrained hyper-connections (mHC, arXiv 2512.24880, eq. 7-9).

        x' = RMSNorm(vec(x)) over nC;   H~ = alpha * (phi x') + b   for pre, post and res
        H_pre = sigmoid(H~_pre)   H_post = 2 sigmoid(H~_post)   H_res = Sinkhorn(exp(H~_res))

    H_res is applied as written, rows over output streams. DeepSeek-V4's code and its ports
    normalise and apply the transposed matrix: load their residual rows of phi and b transposed.
    Initial values (b and phi are unpublished): alpha 0.01, b_res = c I with Sinkhorn(exp(c I))
    close to I, b_post 0, b_pre logit(1/n), so that every map starts as the plain residual.

    `residual: mhc_single_pass` is DeepSeek-V4.1's form (its report, eq. 6): with A, B and C for
    H_pre, H_res and H_post^T,

        X_{l+1} = B_l X_l + C_l F_l(A_{l-1} X_l)

    The read A_l, computed from X_l, is applied to X_{l+1} by the next site, of whatever sub-layer
    and block, so a kernel can write X_{l+1} and read from it in one go. It travels in
    `Streams.read`. The first site of the network reads the mean. The read of the last site serves
    MTP of V4, and nothing without.

    The product with phi is computed in the type of the streams; everything after it in fp32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.single_pass = config.residual == "mhc_single_pass"
        self.num_iterations = config.hyper_connection.sinkhorn_iterations
        self.phi = nn.Parameter(torch.empty(sum(self.widths), self.widths[0] * config.hidden_size))

    def forward(self, streams: Streams) -> tuple[Float[Tensor, "batch seq hidden"], Maps]:
        """The input of the sub-layer, and what `write` needs."""
        assert (streams.read is not None) == self.single_pass, "streams of another kind"
        layer_input, x, pre, post, res = _ManifoldRead.apply(
            self, streams.segment, streams.x, streams.read, self.phi, self.alpha, self.bias
        )  # type: ignore[no-untyped-call]
        next_read = pre if self.single_pass else None
        return layer_input, self.maps(x, post, res, next_read, streams.segment)


class GatedReadOut(nn.Module):
    """Leave the network as DeepSeek-V4 does (`hc_head` in its code): a gated sum of the streams.

        x' = RMSNorm(vec(x)) over nC;   gate = sigmoid(alpha * (phi x') + b);   h = sum_i gate_i x_i

    With b = logit(1/n) and a small alpha it starts as the mean of the streams. V4's code adds 1e-6
    to the gates, which is left out here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = num_streams(config)
        self.eps = config.rms_norm_eps
        self.phi = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.alpha = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(n))

    def forward(self, streams: Streams) -> Float[Tensor, "batch seq hidden"]:
        """The hidden state that the final norm takes."""
        x = streams.x
        flat = x.flatten(2).to(wide_type(x))
        projected = F.linear(F.rms_norm(flat, flat.shape[-1:], eps=self.eps), self.phi)
        gate = torch.sigmoid(self.alpha * projected + self.bias).to(x.dtype)
        return torch.matmul(gate.unsqueeze(2), x).squeeze(2)


class _ManifoldRead(torch.autograd.Function):
    """Maps of a site and the input of its sub-layer; x itself for `_Write`."""

    @staticmethod
    def forward(
        ctx: Any,
        site: ManifoldHyperConnection,
        segment: StreamSegment | None,
        stream: Tensor,
        read: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        phi, alpha, bias = (parameter.detach() for parameter in parameters)
        passes, leading = site.passes, stream.shape[:2]
        x = _tokens(stream)
        scale = torch.rsqrt(passes.mean_square(x) + site.eps)
        product = _project(x.flatten(1), phi).to(scale.dtype)
        projected, pre, post, res = passes.maps(product, scale, alpha, bias, site.num_iterations)
        read = pre if read is None else _tokens(read)
        ctx.passes, ctx.single_pass = passes, site.single_pass
        ctx.num_iterations = site.num_iterations
        ctx.place = None if segment is None else segment.place()
        kept = x if segment is None else None
        ctx.save_for_backward(kept, phi, alpha, bias, scale, projected, read, res)
        layer_input = passes.read(x, read)
        # detach() shares the memory without being a view, of which FSDP2 warns.
        layer_input, pre, post, res = (
            _split(tensor, leading).detach() for tensor in (layer_input, pre, post, res)
        )
        if not site.single_pass:
            ctx.mark_non_differentiable(pre)
        return layer_input, stream.detach(), pre, post, res

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_input: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, phi, alpha, bias, scale, projected, read, res = ctx.saved_tensors
        x = kept if ctx.place is None else ctx.place.read()
        passes, leading = ctx.passes, grad_input.shape[:2]
        df, g, grad_pre, grad_post, grad_res = (
            _tokens(grad).contiguous() for grad in (grad_input, *grads)
        )
        grad_read = passes.read_grad(x, df)
        single_pass = ctx.single_pass
        grad_product, shrink, grad_alpha, grad_bias = passes.maps_grad(
            projected,
            scale,
            alpha,
            bias,
            grad_pre=grad_pre if single_pass else grad_read,
            grad_post=grad_post,
            grad_res=grad_res,
            num_iterations=ctx.num_iterations,
            width=phi.shape[1],
        )
        grad_x = passes.stream_grad(g, df, x, read=read, res=res, shrink=shrink)
        grad_product = grad_product.to(x.dtype)
        grad_x.flatten(1).addmm_(grad_product, phi.to(x.dtype))
        grad_phi = (grad_product.t() @ x.flatten(1)).to(phi.dtype)
        if ctx.place is not None:
            ctx.place.leave()
        return (
            None,
            None,
            _split(grad_x, leading),
            _split(grad_read, leading) if single_pass else None,
            grad_phi,
            grad_alpha,
            grad_bias,
        )


class _Read(torch.autograd.Function):
    """`sum_i pre_i x_i` per token, and x itself for `_Write`, whose maps `res` are."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, pre: Tensor, res: Tensor, passes: Passes
    ) -> tuple[Tensor, Tensor]:
        x, read = _tokens(stream), _tokens(pre)
        ctx.passes = passes
        ctx.save_for_backward(x, read, _tokens(res))
        return _split(passes.read(x, read), stream.shape[:2]).detach(), stream.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_input: Tensor, grad_written: Tensor) -> tuple[Tensor | None, ...]:
        x, read, res = ctx.saved_tensors
        g, df = (_tokens(grad).contiguous() for grad in (grad_written, grad_input))
        grad_x = ctx.passes.stream_grad(g, df, x, read=read, res=res, shrink=None)
        leading = grad_input.shape[:2]
        grad_read = ctx.passes.read_grad(x, df)
        return _split(grad_x, leading), _split(grad_read, leading), None, None


class _Write(torch.autograd.Function):
    """`res x + post f` per token. The gradient of x is left to the site: see `Maps.x`."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        segment: StreamSegment | None,
        stream: Tensor,
        output: Tensor,
        *maps: Tensor,
    ) -> Tensor:
        leading = stream.shape[:2]
        x, f, post, res = (_tokens(tensor) for tensor in (stream, output, *maps))
        ctx.passes = passes
        ctx.place = None if segment is None else segment.place()
        ctx.save_for_backward(x if segment is None else None, f, post)
        if segment is not None:
            segment.record(lambda x: passes.write(x, f, post, res))
        return _split(passes.write(x, f, post, res), leading).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, f, post = ctx.saved_tensors
        x = kept if ctx.place is None else ctx.place.read()
        leading = grad.shape[:2]
        grads = ctx.passes.write_grad(_tokens(grad).contiguous(), x, f, post)
        df, grad_post, grad_res = (_split(part, leading) for part in grads)
        return None, None, grad, df, grad_post, grad_res


def _project(x: Tensor, phi: Tensor) -> Tensor:
    """`phi x` in the type of x."""
    rows = len(phi)
    if x.dtype == torch.bfloat16:
        # oneDNN takes 1.5-2 times as long for 24 columns as for 32.
        phi = F.pad(phi, (0, 0, 0, -rows % 32))
    return F.linear(x, phi.to(x.dtype))[:, :rows]


def _tokens(x: Tensor) -> Tensor:
    """Batch and sequence as one dim; without its history, which the compiler would warn of."""
    return x.detach().flatten(0, 1)


def _split(x: Tensor, leading: torch.Size) -> Tensor:
    """Tokens as [batch, seq] again."""
    return x.view(*leading, *x.shape[1:])
