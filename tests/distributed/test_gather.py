"""Gathers and reduce-scatters of host memory: every bit of them, and what they leave to the library."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.backend.gather import all_gather, reduce_scatter
from parallel.torch_compat import init_fake_process_group
from tests.harness import run_distributed


def summand(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """Of sizes so different that another order of the ranks gives another sum."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(ranks * 3, 1, 50, generator=generator)
    return (values * 1000.0 ** torch.randn(values.shape, generator=generator)).to(dtype)


def sums_and_gathers(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    assert group is not None

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("gloo sums everything on every rank")

    dist.reduce_scatter_single = refuse
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        summands = [summand(other, ranks, dtype) for other in range(ranks)]
        expected = summands[0].clone()
        for other in summands[1:]:
            expected += other
        own = slice(3 * rank, 3 * rank + 3)
        for turn in range(3):
            time.sleep(0.01 * ((rank + turn) % ranks))  # another rank is the last one
            part, whole = summands[rank].new_empty(3, 1, 50), torch.empty_like(expected)
            reduce_scatter(part, summands[rank].clone(), group)
            assert torch.equal(part, expected[own])
            assert all_gather(whole, part, group) is None
            assert torch.equal(whole, expected)
        flat = torch.zeros_like(expected).flatten()
        place = flat.view(ranks, -1)[rank].copy_(part.flatten())
        work = all_gather(flat, place, group, async_op=True)
        assert work is not None
        work.wait()
        assert torch.equal(flat, expected.flatten())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sums_are_in_the_order_of_the_ranks_whoever_is_late(ranks: int) -> None:
    """In fp64, fp32 and bf16, against the sum of one process; the gather brings them all together."""
    run_distributed(sums_and_gathers, ranks, ranks)


def test_devices_use_what_their_library_has(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("reduce_scatter_single", "all_gather_single"):
        monkeypatch.setattr(dist, name, lambda *args, name=name, **kwargs: called.append(name))
    init_fake_process_group(0, 2)
    try:
        assert dist.group.WORLD is not None
        whole, part = torch.empty(4, 3, device="meta"), torch.empty(2, 3, device="meta")
        reduce_scatter(part, whole, dist.group.WORLD)
        all_gather(whole, part, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert called == ["reduce_scatter_single", "all_gather_single"]
