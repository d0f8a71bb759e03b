"""Errors of the compiled passes against the eager ones, as JSON: run by `test_stream_passes`.

A process of its own: the tests' shape checks wrap every function in one that the compiler then
sees again and again, until it refuses.
"""

import json
import sys

import torch
from torch import Tensor, nn

from tests.unit.train.model.tiny import TINY, relative_error, with_changes
from train.model.config import HyperConnectionConfig
from train.model.residual import build_site
from train.model.streams import expand_streams

KINDS = ("hc", "mhc", "mhc_single_pass")
LENGTHS = (48, 31)


def two_sites(kind: str, compiled: bool, dtype: torch.dtype, seq: int) -> list[Tensor]:
    """The streams after two sites, and all gradients."""
    # Fewer passes than 20 compile faster; every pass is the same code.
    connection = HyperConnectionConfig(compile=compiled, sinkhorn_iterations=3)
    config = with_changes(TINY, residual=kind, hyper_connection=connection)
    torch.manual_seed(0)
    sites = [build_site(config, index) for index in range(2)]
    parameters = [p for site in sites for p in site.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, seq, 32).to(dtype).requires_grad_()
    streams = expand_streams(hidden, config)
    for site in sites:
        layer_input, maps = site(streams)
        streams = site.write(torch.tanh(layer_input), maps)
    direction = torch.randn(streams.x.shape)
    grads = torch.autograd.grad((streams.x * direction).sum(), [hidden, *parameters])
    return [streams.x, *grads]


def excess() -> dict[str, float]:
    """How far the compiled form is beyond what each type allows, by kind and type; at most 1.

    fp32: the relative difference of the two forms over 1e-5. bf16: both round, each in its own
    order, so each is compared with the fp32 result of the same inputs: the compiled form's error
    over 1.5 times the eager one's + 0.01.
    """
    largest: dict[str, float] = {}
    for kind in KINDS:
        for seq in LENGTHS:
            exact = two_sites(kind, False, torch.float32, seq)
            compiled = two_sites(kind, True, torch.float32, seq)
            fp32 = [relative_error(a, b) / 1e-5 for a, b in zip(compiled, exact, strict=True)]
            low, low_compiled = (two_sites(kind, c, torch.bfloat16, seq) for c in (False, True))
            bf16 = []
            for mine, theirs, wanted in zip(low_compiled, low, exact, strict=True):
                assert mine.dtype == theirs.dtype
                allowed = 1.5 * relative_error(theirs.float(), wanted) + 0.01
                bf16.append(relative_error(mine.float(), wanted) / allowed)
            for name, values in (("fp32", fp32), ("bf16", bf16)):
                key = f"{kind} {name}"
                largest[key] = max(*values, largest.get(key, 0.0))
    return largest


if __name__ == "__main__":
    sys.stdout.write(json.dumps(excess()))
