import json
import subprocess
import sys

import pytest
import torch

from parallel.torch_compat import find_cpp_compiler
from tests.unit.train.model.compiled_sites import KINDS
from train.model.stream_passes import EAGER, _fused_stream_grad, _fused_write_grad


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_cpp_compiler() is None, reason="no C++ compiler")
def test_compiled_sites_equal_eager_ones_at_every_length() -> None:
    """Whole sites, forward and backward, every kind and type."""
    command = [sys.executable, "-m", "tests.unit.train.model.compiled_sites"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    excess = json.loads(answer.stdout)
    assert len(excess) == 2 * len(KINDS)
    assert {case: value for case, value in excess.items() if value > 1} == {}


def test_written_out_passes_equal_products() -> None:
    """The source of the compiled form, interpreted: the default tests run without a compiler."""
    torch.manual_seed(0)
    g, x = torch.randn(2, 7, 3, 5).unbind(0)
    f, post, shrink = torch.randn(7, 5), torch.randn(7, 3), torch.randn(7)
    res = torch.randn(7, 3, 3)
    for found, wanted in zip(
        _fused_write_grad(g, x, f, post), EAGER.write_grad(g, x, f, post), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    for factor in (shrink, None):
        torch.testing.assert_close(
            _fused_stream_grad(g, f, x, read=post, res=res, shrink=factor),
            EAGER.stream_grad(g, f, x, read=post, res=res, shrink=factor),
        )
