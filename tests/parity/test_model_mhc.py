"""mHC against an implementation that is not ours: transformers' DeepSeek-V4 hyper-connection."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.unit.train.model.tiny import TINY, relative_error
from train.model.hyper_connection import GatedReadOut, ManifoldHyperConnection
from train.model.streams import Streams


def transposed(rows: Tensor) -> Tensor:
    """Theirs holds the residual map transposed: exchange its two indices among the last 16 rows."""
    residual = rows[8:].view(4, 4, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows[:8], residual])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_maps_and_gradients_equal_transformers() -> None:
    from transformers import DeepseekV4Config  # noqa: PLC0415
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (  # noqa: PLC0415
        DeepseekV4HyperConnection,
    )

    torch.manual_seed(0)
    config = DeepseekV4Config(hidden_size=32, hc_mult=4, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
    config.hc_eps = 0.0
    theirs = DeepseekV4HyperConnection(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = ManifoldHyperConnection(replace(TINY, residual="mhc"))
    with torch.no_grad():
        ours.phi.copy_(transposed(theirs.fn))
        ours.bias.copy_(transposed(theirs.base))
        ours.alpha.copy_(theirs.scale)

    stream, output = torch.randn(2, 50, 4, 32), torch.randn(2, 50, 32)
    read, maps = ours(Streams(stream))
    written = ours.write(output, maps).x
    post, comb, collapsed = theirs(stream)
    # As in transformers' decoder layer: the mixing matrix is applied transposed.
    mixed = post[..., None] * output[:, :, None] + comb.transpose(-1, -2) @ stream
    torch.testing.assert_close(read, collapsed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.res, comb.transpose(-1, -2), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(written, mixed, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(written)
    mine = torch.autograd.grad((written * weight).sum() + read.sum(), (ours.phi, ours.bias))
    reference = torch.autograd.grad(
        (mixed * weight).sum() + collapsed.sum(), (theirs.fn, theirs.base)
    )
    for found, wanted in zip(mine, reference, strict=True):
        torch.testing.assert_close(
            found, transposed(wanted), rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gated_read_out_equals_transformers_head(eps: float) -> None:
    """Their published eps on the gates is within the bound, so leaving it out changes nothing."""
    from transformers import DeepseekV4Config  # noqa: PLC0415
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (  # noqa: PLC0415
        DeepseekV4HyperHead,
    )

    torch.manual_seed(0)
    config = DeepseekV4Config(hidden_size=32, hc_mult=4, rms_norm_eps=1e-6)
    config.hc_eps = eps
    theirs, ours = DeepseekV4HyperHead(config), GatedReadOut(replace(TINY, residual="mhc"))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        ours.phi.copy_(theirs.hc_fn)
        ours.bias.copy_(theirs.hc_base)
        ours.alpha.copy_(theirs.hc_scale)
    stream = torch.randn(2, 50, 4, 32, requires_grad=True)
    found, wanted = ours(Streams(stream)), theirs(stream)
    assert relative_error(found, wanted) < 2e-5
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), (stream, *ours.parameters()))
    reference = torch.autograd.grad(
        (wanted * weight).sum(), (stream, theirs.hc_fn, theirs.hc_scale, theirs.hc_base)
    )
    for left, right in zip(mine, reference, strict=True):
        assert relative_error(left, right) < 2e-5
