"""How a sub-layer reads from the residual stream and writes back: plain, HC or mHC; called by `block`.

The stream is `[batch, seq, streams, hidden]` everywhere, with one stream for `plain`, so that
blocks, Engram and pipeline stages know one shape. Around each sub-layer F stands one site:

    layer_input, maps = site(stream)
    stream = site.write(F(layer_input), maps)

    x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)        x in R^{n x C}

All parameters are used in `site(...)`; `write` needs none. At initialisation all three kinds compute
the plain pre-norm network. The maps are computed in fp32 or wider; the stream keeps its type.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.model.config import ModelConfig
from train.model.sinkhorn import project_doubly_stochastic


class Maps(NamedTuple):
    """What `write` needs: the stream that was read, and the maps of its tokens."""

    stream: Float[Tensor, "batch seq streams hidden"]
    post: Float[Tensor, "batch seq streams"]
    res: Float[Tensor, "batch seq streams streams"]


def num_streams(config: ModelConfig) -> int:
    """Parallel residual streams n; 1 for the plain residual."""
    return 1 if config.residual == "plain" else config.hyper_connection.num_streams


def expand_streams(
    hidden: Float[Tensor, "batch seq hidden"], streams: int
) -> Float[Tensor, "batch seq streams hidden"]:
    """Enter the network: every stream starts as a copy of the embedding."""
    return hidden.unsqueeze(2).expand(-1, -1, streams, -1).contiguous()


def read_out(
    stream: Float[Tensor, "batch seq streams hidden"],
) -> Float[Tensor, "batch seq hidden"]:
    """Leave the network: the mean of the streams.

    HC (arXiv 2409.19606) publishes the sum. The RMSNorm that follows makes both the same network
    (up to its eps); the mean keeps the scale of the plain residual.
    """
    return stream.mean(dim=2)


class PlainResidual(nn.Module):
    """`x + F(x)`: one stream, no parameters."""

    def forward(
        self, stream: Float[Tensor, "batch seq 1 hidden"]
    ) -> tuple[Float[Tensor, "batch seq hidden"], Tensor]:
        """The input of the sub-layer, and the stream for `write`."""
        return stream.squeeze(2), stream

    def write(
        self, output: Float[Tensor, "batch seq hidden"], stream: Tensor
    ) -> Float[Tensor, "batch seq 1 hidden"]:
        """Add the sub-layer's output."""
        return stream + output.unsqueeze(2)


class _StreamSite(nn.Module):
    """What HC and mHC share: fused maps of widths (n, n, n^2), weight alpha and bias of each.

    Set `capture` to keep the residual maps of the latest forward pass in `residual_map`, for
    monitors; they are views of tensors that exist anyway.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = num_streams(config)
        self.widths = [n, n, n * n]
        self.eps = config.rms_norm_eps
        self.alpha = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(sum(self.widths)))
        self.capture = False
        self.residual_map: Float[Tensor, "batch seq streams streams"] | None = None

    def read(
        self,
        stream: Float[Tensor, "batch seq streams hidden"],
        pre: Float[Tensor, "batch seq streams"],
        post: Float[Tensor, "batch seq streams"],
        res: Float[Tensor, "batch seq streams streams"],
    ) -> tuple[Float[Tensor, "batch seq hidden"], Maps]:
        """`H_pre x`, and what `write` needs."""
        if self.capture:
            self.residual_map = res.detach()
        # On the CPU, products with strided small matrices copy them one by one.
        pre, post, res = pre.contiguous(), post.contiguous(), res.contiguous()
        layer_input, stream = _Read.apply(stream, pre)  # type: ignore[no-untyped-call]
        return layer_input, Maps(stream, post, res)

    def write(
        self, output: Float[Tensor, "batch seq hidden"], maps: Maps
    ) -> Float[Tensor, "batch seq streams hidden"]:
        """`H_res x + H_post^T output`."""
        result: Tensor = _Write.apply(*maps, output)  # type: ignore[no-untyped-call]
        return result


class HyperConnection(_StreamSite):
    """Unconstrained hyper-connections in the form that the mHC paper compares with (its eq. 5).

        x~ = RMSNorm(x) per stream;   H = alpha * tanh(theta x~^T) + b   for pre, post and res

    theta has n + 2 rows of width C. Initial values are those of the original (arXiv 2409.19606):
    theta 0, b_post 1, b_res the identity, b_pre one-hot at `site_index` modulo n.
    """

    def __init__(self, config: ModelConfig, site_index: int) -> None:
        super().__init__(config)
        self.site_index = site_index
        self.theta = nn.Parameter(torch.empty(2 + self.widths[0], config.hidden_size))

    def forward(
        self, stream: Float[Tensor, "batch seq streams hidden"]
    ) -> tuple[Float[Tensor, "batch seq hidden"], Maps]:
        """The input of the sub-layer, and what `write` needs."""
        wide = torch.promote_types(stream.dtype, torch.float32)
        normalised = F.rms_norm(stream.to(wide), stream.shape[-1:], eps=self.eps)
        gates = torch.tanh(F.linear(normalised, self.theta.to(wide)))
        b_pre, b_post, b_res = torch.split(self.bias, self.widths)
        pre = self.alpha[0] * gates[..., 0] + b_pre
        post = self.alpha[1] * gates[..., 1] + b_post
        # Entry (i, j) of the map is theta_res[i] . x~[j]; `gates` has the stream j in front.
        res = self.alpha[2] * gates[..., 2:].transpose(2, 3) + b_res.view(gates.shape[2], -1)
        return self.read(stream, pre, post, res)


class ManifoldHyperConnection(_StreamSite):
    """Manifold-constrained hyper-connections (mHC, arXiv 2512.24880, eq. 7-9).

        x' = RMSNorm(vec(x)) over nC;   H~ = alpha * (phi x') + b   for pre, post and res
        H_pre = sigmoid(H~_pre)   H_post = 2 sigmoid(H~_post)   H_res = Sinkhorn(exp(H~_res))

    H_res is applied as written, rows over output streams. DeepSeek-V4's code and its ports
    normalise and apply the transposed matrix: load their residual rows of phi and b transposed.
    Initial values (b and phi are unpublished): alpha 0.01, b_res = c I with Sinkhorn(exp(c I))
    close to I, b_post 0, b_pre logit(1/n), so that every map starts as the plain residual.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        n, self.num_iterations = self.widths[0], config.hyper_connection.sinkhorn_iterations
        self.phi = nn.Parameter(torch.empty(sum(self.widths), n * config.hidden_size))

    def forward(
        self, stream: Float[Tensor, "batch seq streams hidden"]
    ) -> tuple[Float[Tensor, "batch seq hidden"], Maps]:
        """The input of the sub-layer, and what `write` needs."""
        batch, seq, n, _ = stream.shape
        projected, stream = _ProjectNormalised.apply(stream, self.phi, self.eps)  # type: ignore[no-untyped-call]
        # Tokens last in memory too: Sinkhorn then runs over long rows.
        maps = projected.t().contiguous()
        parts = zip(
            self.alpha,
            torch.split(maps, self.widths),
            torch.split(self.bias, self.widths),
            strict=True,
        )
        pre, post, res = (alpha * part + bias.unsqueeze(1) for alpha, part, bias in parts)
        res = project_doubly_stochastic(res.unflatten(0, (n, n)), self.num_iterations)
        return self.read(
            stream,
            torch.sigmoid(pre).t().reshape(batch, seq, n),
            2 * torch.sigmoid(post).t().reshape(batch, seq, n),
            res.permute(2, 0, 1).reshape(batch, seq, n, n),
        )


Site = PlainResidual | HyperConnection | ManifoldHyperConnection


def build_site(config: ModelConfig, site_index: int) -> Site:
    """The residual site of one sub-layer; sites are counted through the network from 0."""
    if config.residual == "plain":
        return PlainResidual()
    if config.residual == "hc":
        return HyperConnection(config, site_index)
    return ManifoldHyperConnection(config)


class _ProjectNormalised(torch.autograd.Function):
    """`phi RMSNorm(vec(x))` per token, and x itself.

    The division by the root mean square follows the product, so x is not copied. This function
    and the next hand x on: its gradient then comes in as one tensor and is added in one pass.
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(stream.dtype, torch.float32)
        x = stream.flatten(2).flatten(0, 1)
        mean_square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide) ** 2 / x.shape[1]
        scale = torch.rsqrt(mean_square + eps)
        projected = F.linear(x.to(wide), phi.to(wide)) * scale
        ctx.save_for_backward(x, phi, scale, projected)
        return projected, stream.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_projected: Tensor, grad_stream: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, phi, scale, projected = ctx.saved_tensors
        wide = scale.dtype
        # y = (phi x) s with s = (|x|^2/m + eps)^(-1/2): dx = phi^T (dy s) - (dy . y) s^2/m x.
        shrink = -(grad_projected * projected).sum(1, keepdim=True) * scale**2 / x.shape[1]
        grad_product = grad_projected * scale
        grad_x = torch.addcmul(grad_stream.reshape(x.shape), shrink.to(x.dtype), x)
        grad_x.addmm_(grad_product.to(x.dtype), phi.to(x.dtype))
        grad_phi = grad_product.t() @ x.to(wide)
        return grad_x.view(grad_stream.shape), grad_phi.to(phi.dtype), None


class _Read(torch.autograd.Function):
    """`sum_i pre_i x_i` per token, and x itself."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(stream, pre)
        weights = pre.to(stream.dtype).unsqueeze(2)
        # detach() shares the memory without being a view, of which FSDP2 warns.
        return torch.matmul(weights, stream).squeeze(2).detach(), stream.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_input: Tensor, grad_stream: Tensor) -> tuple[Tensor, Tensor]:
        stream, pre = ctx.saved_tensors
        weights = pre.to(stream.dtype).unsqueeze(3)
        grad = torch.addcmul(grad_stream, weights, grad_input.unsqueeze(2))
        return grad, torch.matmul(stream, grad_input.unsqueeze(3)).squeeze(3).to(pre.dtype)


class _Write(torch.autograd.Function):
    """`res x + post output` per token, without materialising an outer product in backward."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, post: Tensor, res: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(stream, post, res, output)
        mixed = torch.matmul(res.to(stream.dtype), stream)
        return mixed.addcmul_(post.to(stream.dtype).unsqueeze(3), output.unsqueeze(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stream, post, res, output = ctx.saved_tensors
        dtype = stream.dtype
        grad_stream = torch.matmul(res.to(dtype).transpose(2, 3), grad)
        grad_post = torch.matmul(grad, output.unsqueeze(3)).squeeze(3)
        grad_res = torch.matmul(grad, stream.transpose(2, 3))
        grad_output = torch.matmul(post.to(dtype).unsqueeze(2), grad).squeeze(2)
        return grad_stream, grad_post.to(post.dtype), grad_res.to(res.dtype), grad_output
