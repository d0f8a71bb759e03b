"""The device's backend: the conformance suite with one rank, and tensors of the host beside it.

`mneme doctor --nproc N` runs the suite with as many ranks as a machine has devices.
"""

import os

import pytest
import torch
import torch.distributed as dist

from parallel.backend.conformance.checks import Ranks
from parallel.backend.conformance.suite import SUITE
from parallel.backend.select import select_backend
from tests.gpu.worker import Worker

pytestmark = pytest.mark.gpu


def conform(name: str, check: str) -> None:
    backend = select_backend(name)
    assert backend.why_unavailable() is None
    device = backend.device(int(os.environ["LOCAL_RANK"]))
    backend.set_device(device)
    backend.init_process_group(timeout_seconds=60.0)
    SUITE[check].run(Ranks(backend=backend, device=device, rank=0, size=1, timeout_seconds=60.0))
    backend.synchronize()


@pytest.mark.parametrize("check", SUITE)
def test_one_rank_conforms(device: Worker, check: str) -> None:
    device.call(conform, check)


def communicate_on_the_host(name: str) -> None:
    backend = select_backend(name)
    backend.set_device(backend.device(int(os.environ["LOCAL_RANK"])))
    backend.init_process_group(timeout_seconds=60.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        value = torch.full((3,), 7, dtype=dtype)
        dist.all_reduce(value)
        assert value.tolist() == [7, 7, 7], dtype
        dist.broadcast(value, 0)


def test_tensors_of_the_host_use_the_same_group(device: Worker) -> None:
    device.call(communicate_on_the_host)
