from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.train.model.tiny import TINY, build, packed, relative_error, with_changes
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.residual import (
    HyperConnection,
    ManifoldHyperConnection,
    PlainResidual,
    build_site,
    expand_streams,
    read_out,
)
from train.model.sinkhorn import project_doubly_stochastic
from train.model.transformer import Transformer

SMALL = replace(TINY, hidden_size=5, hyper_connection=HyperConnectionConfig(num_streams=3))


def randomised(site: nn.Module, scale: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    for parameter in site.parameters():
        nn.init.normal_(parameter, std=scale)
    return site.double()


def per_token_hc(site: HyperConnection, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """mHC eq. 5 for one token: x is [streams, hidden]."""
    n = len(x)
    normalised = x / (x.pow(2).mean(-1, keepdim=True) + site.eps).sqrt()
    pre = site.alpha[0] * torch.tanh(site.theta[:1] @ normalised.T) + site.bias[:n]
    post = site.alpha[1] * torch.tanh(site.theta[1:2] @ normalised.T) + site.bias[n : 2 * n]
    res = torch.tanh(site.theta[2:] @ normalised.T)
    res = site.alpha[2] * res + site.bias[2 * n :].reshape(n, n)
    return (pre @ x)[0], res @ x + post.T @ output[None]


def per_token_mhc(
    site: ManifoldHyperConnection, x: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """mHC eq. 7-9 for one token."""
    n = len(x)
    flat = x.flatten()
    normalised = flat / (flat.pow(2).mean() + site.eps).sqrt()
    logits = site.phi @ normalised
    pre = torch.sigmoid(site.alpha[0] * logits[:n] + site.bias[:n])
    post = 2 * torch.sigmoid(site.alpha[1] * logits[n : 2 * n] + site.bias[n : 2 * n])
    res = (site.alpha[2] * logits[2 * n :] + site.bias[2 * n :]).reshape(n, n).exp()
    for _ in range(site.num_iterations):
        res = res / res.sum(0, keepdim=True)
        res = res / res.sum(1, keepdim=True)
    return pre @ x, res @ x + post[:, None] * output


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_site_equals_the_papers_formula_token_by_token(kind: str) -> None:
    site = randomised(build_site(with_changes(SMALL, residual=kind), 1))
    assert isinstance(site, HyperConnection | ManifoldHyperConnection)
    stream = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64)
    layer_input, maps = site(stream)
    found = site.write(torch.tanh(layer_input @ weight), maps)

    formula = per_token_hc if isinstance(site, HyperConnection) else per_token_mhc
    rows = []
    for x in stream.flatten(0, 1):
        read, _ = formula(site, x, torch.zeros(5, dtype=torch.float64))  # type: ignore[arg-type]
        rows.append(formula(site, x, torch.tanh(read @ weight))[1])  # type: ignore[arg-type]
    wanted = torch.stack(rows).view_as(stream)
    torch.testing.assert_close(found, wanted)

    leaves = (stream, *site.parameters())
    direction = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, direction),
        torch.autograd.grad(wanted, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_analytic_gradients(kind: str) -> None:
    site = randomised(build_site(with_changes(SMALL, residual=kind), 1))
    stream = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    output = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)

    def both(stream: Tensor, output: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        layer_input, maps = site(stream)
        written: Tensor = site.write(output, maps)  # type: ignore[operator]
        return layer_input, written

    assert torch.autograd.gradcheck(both, (stream, output, *site.parameters()))


def test_sinkhorn_gradient_of_spread_logits() -> None:
    logits = (3 * torch.randn(4, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: project_doubly_stochastic(z, 20), (logits,))


def test_plain_adds_the_output() -> None:
    site, stream = PlainResidual(), torch.randn(2, 3, 1, 5)
    layer_input, kept = site(stream)
    assert torch.equal(layer_input, stream[:, :, 0])
    output = torch.randn(2, 3, 5)
    assert torch.equal(site.write(output, kept)[:, :, 0], layer_input + output)


def copy_common(source: Transformer, target: Transformer) -> None:
    """Give both the same weights outside the residual sites."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "_site." not in name:
                parameter.copy_(values[name])


@pytest.mark.parametrize(
    ("kind", "phi_std", "bound"),
    # With phi = 0 mHC is exact up to rounding. Its dynamic part, alpha 0.01 x phi N(0, 0.02) x a
    # normalised input, moves read and write gates by less than a percent.
    [("hc", 0.02, 1e-6), ("mhc", 0.0, 2e-6), ("mhc", 0.02, 5e-3)],
)
def test_every_kind_starts_as_the_plain_prenorm_network(
    kind: str, phi_std: float, bound: float
) -> None:
    plain = build(with_changes(TINY, residual="plain"))
    connection = HyperConnectionConfig(phi_init_std=phi_std)
    model = build(with_changes(TINY, residual=kind, hyper_connection=connection))
    copy_common(plain, model)
    batch = packed((5, 7))
    assert relative_error(model(*batch).logits, plain(*batch).logits) < bound


def test_bf16_stream_keeps_its_type_with_fp32_maps() -> None:
    for kind in ("hc", "mhc"):
        config: ModelConfig = with_changes(SMALL, residual=kind)
        site = randomised(build_site(config, 0), 0.2).float()
        stream = torch.randn(2, 3, 3, 5)
        low = stream.bfloat16().requires_grad_()
        layer_input, maps = site(low)
        written = site.write(layer_input, maps)  # type: ignore[operator]
        assert layer_input.dtype == written.dtype == torch.bfloat16
        assert maps.post.dtype == maps.res.dtype == torch.float32
        wanted_input, wanted_maps = site(low.float())
        torch.testing.assert_close(maps.res, wanted_maps.res, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer_input.float(), wanted_input, rtol=0.02, atol=0.02)
        written.sum().backward()
        assert low.grad is not None
        assert low.grad.dtype == torch.bfloat16
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in site.parameters())


@pytest.mark.parametrize("capture", [False, True])
def test_capture_keeps_the_residual_maps(capture: bool) -> None:
    site = randomised(build_site(replace(SMALL, residual="mhc"), 0))
    assert isinstance(site, ManifoldHyperConnection)
    site.capture = capture
    _, maps = site(torch.randn(2, 4, 3, 5, dtype=torch.float64))
    if capture:
        assert site.residual_map is not None
        assert torch.equal(site.residual_map, maps.res)
        assert not site.residual_map.requires_grad
    else:
        assert site.residual_map is None


def test_entry_and_exit_undo_each_other() -> None:
    hidden = torch.randn(2, 3, 5)
    assert torch.equal(read_out(expand_streams(hidden, 4)), hidden)
    assert F.mse_loss(read_out(torch.arange(4.0).view(1, 1, 4, 1)), torch.tensor([[[1.5]]])) == 0
