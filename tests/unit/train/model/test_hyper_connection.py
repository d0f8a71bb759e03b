from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.unit.train.model.tiny import FULL, TINY, build, packed, with_changes
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.hyper_connection import GatedReadOut, HyperConnection, ManifoldHyperConnection
from train.model.residual import build_site
from train.model.streams import Streams, expand_streams

SMALL = replace(TINY, hidden_size=5, hyper_connection=HyperConnectionConfig(num_streams=3))
KINDS = ["hc", "mhc", "mhc_single_pass"]


def random_site(
    config: ModelConfig, scale: float = 0.5
) -> HyperConnection | ManifoldHyperConnection:
    torch.manual_seed(0)
    site = build_site(config, 1)
    assert isinstance(site, HyperConnection | ManifoldHyperConnection)
    for parameter in site.parameters():
        nn.init.normal_(parameter, std=scale)
    return site.double()


def of_kind(kind: str) -> ModelConfig:
    return with_changes(SMALL, residual=kind)


def random_streams(kind: str, batch: int, seq: int) -> Streams:
    streams = torch.randn(batch, seq, 3, 5, dtype=torch.float64, requires_grad=True)
    if kind != "mhc_single_pass":
        return Streams(streams)
    return Streams(streams, torch.randn(batch, seq, 3, dtype=torch.float64, requires_grad=True))


def maps_hc(site: HyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mHC eq. 5 for one token: x is [streams, hidden]."""
    n = len(x)
    normalised = x / (x.pow(2).mean(-1, keepdim=True) + site.eps).sqrt()
    pre = site.alpha[0] * torch.tanh(site.theta[:1] @ normalised.T) + site.bias[:n]
    post = site.alpha[1] * torch.tanh(site.theta[1:2] @ normalised.T) + site.bias[n : 2 * n]
    res = torch.tanh(site.theta[2:] @ normalised.T)
    return pre[0], post[0], site.alpha[2] * res + site.bias[2 * n :].reshape(n, n)


def maps_mhc(site: ManifoldHyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    return pre, post, res


def assert_gradients_equal(found: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, direction, retain_graph=True),
        torch.autograd.grad(wanted, leaves, direction, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_site_equals_the_papers_formula_token_by_token(kind: str) -> None:
    site, streams = random_site(of_kind(kind)), random_streams(kind, 2, 4)
    weight = torch.randn(5, 5, dtype=torch.float64)
    layer_input, maps = site(streams)
    found = site.write(torch.tanh(layer_input @ weight), maps).x
    rows = []
    for x in streams.x.flatten(0, 1):
        formula = maps_hc if isinstance(site, HyperConnection) else maps_mhc
        pre, post, res = formula(site, x)  # type: ignore[arg-type]
        rows.append(res @ x + post[:, None] * torch.tanh((pre @ x) @ weight))
    wanted = torch.stack(rows).view_as(streams.x)
    assert_gradients_equal(found, wanted, (streams.x, *site.parameters()))


def test_single_pass_reads_by_the_site_before() -> None:
    """V4.1's eq. 6 over three sites: X_{l+1} = B_l X_l + C_l F_l(A_{l-1} X_l), A_{-1} the mean."""
    config = of_kind("mhc_single_pass")
    sites = [random_site(config, scale) for scale in (0.3, 0.5, 0.7)]
    weights = torch.randn(3, 5, 5, dtype=torch.float64)
    entry = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    streams = expand_streams(entry, config)
    for site, weight in zip(sites, weights, strict=True):
        layer_input, maps = site(streams)
        streams = site.write(torch.tanh(layer_input @ weight), maps)

    rows, reads = [], []
    for token in entry.flatten(0, 1):
        x = token.expand(3, 5)
        read = torch.full((3,), 1 / 3, dtype=torch.float64)
        for site, weight in zip(sites, weights, strict=True):
            assert isinstance(site, ManifoldHyperConnection)
            pre, post, res = maps_mhc(site, x)
            x = res @ x + post[:, None] * torch.tanh((read @ x) @ weight)
            read = pre
        rows.append(x)
        reads.append(read)
    parameters = tuple(p for site in sites for p in site.parameters())
    wanted = torch.stack(rows).view_as(streams.x)
    assert_gradients_equal(streams.x, wanted, (entry, *parameters))
    assert streams.read is not None
    assert_gradients_equal(
        streams.read, torch.stack(reads).view_as(streams.read), (entry, *sites[-1].parameters())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_analytic_gradients_of_a_whole_site(kind: str) -> None:
    site, streams = random_site(of_kind(kind)), random_streams(kind, 1, 2)
    output = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    leaves = streams.tensors()

    def both(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        layer_input, maps = site(Streams.of(*inputs[: len(leaves)]))
        written = site.write(output, maps)
        return layer_input, *written.tensors()

    assert torch.autograd.gradcheck(both, (output, *leaves, *site.parameters()))


def test_gated_read_out_equals_its_formula() -> None:
    torch.manual_seed(0)
    read_out = GatedReadOut(of_kind("mhc")).double()
    for parameter in read_out.parameters():
        nn.init.normal_(parameter)
    streams = random_streams("mhc", 2, 4)
    rows = []
    for x in streams.x.flatten(0, 1):
        flat = x.flatten()
        normalised = flat / (flat.pow(2).mean() + read_out.eps).sqrt()
        gate = torch.sigmoid(read_out.alpha * (read_out.phi @ normalised) + read_out.bias)
        rows.append(gate @ x)
    found = read_out(streams)
    leaves = (streams.x, *read_out.parameters())
    assert_gradients_equal(found, torch.stack(rows).view_as(found), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_streams_keep_their_type_with_fp32_maps(kind: str) -> None:
    site = random_site(of_kind(kind), 0.2).float()
    streams = Streams.of(*(t.float() for t in random_streams(kind, 2, 3).tensors()))
    low = streams._replace(x=streams.x.detach().bfloat16().requires_grad_())
    layer_input, maps = site(low)
    written = site.write(layer_input, maps)
    assert layer_input.dtype == written.x.dtype == torch.bfloat16
    assert maps.post.dtype == maps.res.dtype == torch.float32
    assert written.read is None or written.read.dtype == torch.float32
    wanted_input, wanted_maps = site(low._replace(x=low.x.float()))
    # mHC multiplies by phi in bf16, so its maps are rounded to that; HC stays in fp32.
    tolerance = 1e-6 if kind == "hc" else 4e-3
    torch.testing.assert_close(maps.res, wanted_maps.res, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer_input.float(), wanted_input, rtol=0.02, atol=0.02)
    torch.autograd.backward(written.x.sum())
    assert low.x.grad is not None
    assert low.x.grad.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in site.parameters())


def test_a_monitor_gets_the_maps_of_the_last_sequence() -> None:
    site = random_site(of_kind("mhc"))
    streams = random_streams("mhc", 2, 4)
    site.capture = True
    _, maps = site(streams)
    captured, square = site.take_captured()
    assert torch.equal(captured, maps.res[-1])
    assert not captured.requires_grad
    torch.testing.assert_close(square, streams.x[-1].square().mean(dim=(1, 2)))
    site.capture = False
    site(streams)
    with pytest.raises(AssertionError, match="capture was not set"):
        site.take_captured()


def test_engram_adds_before_the_shifted_read() -> None:
    """The read that travels is a coefficient, not a product: what the memory adds is read too."""
    model = build(with_changes(FULL, residual="mhc_single_pass"), noise=0.05)
    batch = packed((6, 5))
    seen: list[Tensor] = []
    block = model.layers["1"]
    block.get_submodule("attention_norm").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    model(*batch)
    table = model.engram_layers()[1].table
    assert table is not None
    table.weight.data.mul_(2)
    model(*batch)
    assert not torch.allclose(seen[0], seen[1])
