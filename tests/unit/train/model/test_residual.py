from dataclasses import replace

import pytest
import torch

from tests.unit.train.model.tiny import TINY, build, packed, relative_error, with_changes
from train.model.config import HyperConnectionConfig, ReadOutKind
from train.model.initialize import mean_gate_bias
from train.model.residual import MeanReadOut, PlainResidual, build_read_out, build_site
from train.model.streams import Streams, expand_streams
from train.model.transformer import Transformer

KINDS = ["hc", "mhc", "mhc_single_pass"]


def test_plain_adds_the_output() -> None:
    site, stream = PlainResidual(), torch.randn(2, 3, 1, 5)
    layer_input, kept = site(Streams(stream))
    assert torch.equal(layer_input, stream[:, :, 0])
    output = torch.randn(2, 3, 5)
    assert torch.equal(site.write(output, kept).x[:, :, 0], layer_input + output)


def copy_common(source: Transformer, target: Transformer) -> None:
    """Give both the same weights outside the residual sites."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in values:
                parameter.copy_(values[name])


@pytest.mark.parametrize(
    ("kind", "phi_std", "bound"),
    # With phi = 0 mHC is exact up to rounding. Its dynamic part, alpha 0.01 x phi N(0, 0.02) x a
    # normalised input, moves read and write gates by less than a percent.
    [
        ("hc", 0.02, 1e-6),
        ("mhc", 0.0, 2e-6),
        ("mhc", 0.02, 5e-3),
        ("mhc_single_pass", 0.0, 2e-6),
        ("mhc_single_pass", 0.02, 5e-3),
    ],
)
@pytest.mark.parametrize("read_out", ["mean", "gated"])
@pytest.mark.parametrize("mtp_kind", ["v3", "v4"])
def test_every_kind_starts_as_the_plain_prenorm_network(
    kind: str, phi_std: float, bound: float, read_out: ReadOutKind, mtp_kind: str
) -> None:
    if (kind, read_out) == ("hc", "gated"):
        # The gates of the read-out are dynamic too.
        phi_std = 0.0
    base = with_changes(TINY, mtp_depth=1, mtp_kind=mtp_kind)
    plain = build(replace(base, residual="plain"))
    connection = HyperConnectionConfig(phi_init_std=phi_std, read_out=read_out)
    model = build(with_changes(base, residual=kind, hyper_connection=connection))
    copy_common(plain, model)
    batch = packed((5, 7))
    found, wanted = model(*batch), plain(*batch)
    assert relative_error(found.logits, wanted.logits) < bound
    assert relative_error(found.mtp_logits[0], wanted.mtp_logits[0]) < bound


def test_entry_and_exit_undo_each_other() -> None:
    hidden = torch.randn(2, 3, 5)
    for kind in ("plain", *KINDS):
        config = with_changes(TINY, residual=kind)
        assert torch.equal(MeanReadOut()(expand_streams(hidden, config)), hidden)
    mean = MeanReadOut()(Streams(torch.arange(4.0).view(1, 1, 4, 1)))
    assert mean.item() == 1.5


def test_a_gated_read_out_with_mean_gates_is_the_mean() -> None:
    connection = HyperConnectionConfig(read_out="gated")
    gated = build_read_out(replace(TINY, hyper_connection=connection))
    for parameter in gated.parameters():
        torch.nn.init.zeros_(parameter)
    gated.get_parameter("bias").data.copy_(mean_gate_bias(4))
    streams = Streams(torch.randn(2, 3, 4, 32))
    torch.testing.assert_close(gated(streams), MeanReadOut()(streams))


def test_one_stream_has_nothing_to_gate() -> None:
    connection = HyperConnectionConfig(read_out="gated")
    plain = replace(TINY, residual="plain", hyper_connection=connection)
    assert isinstance(build_read_out(plain), MeanReadOut)


@pytest.mark.parametrize("kind", ["mhc", "mhc_single_pass"])
def test_streams_of_another_kind_are_refused(kind: str) -> None:
    site = build_site(with_changes(TINY, residual=kind), 0)
    other = "mhc" if kind == "mhc_single_pass" else "mhc_single_pass"
    streams = expand_streams(torch.randn(1, 2, 32), with_changes(TINY, residual=other))
    with pytest.raises(AssertionError, match="streams of another kind"):
        site(streams)
