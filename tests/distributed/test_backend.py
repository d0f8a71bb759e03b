"""What every backend must be able to do, run on the host; and a world without peers."""

import os
import re

import pytest
import torch
import torch.distributed as dist

from parallel.backend.select import BACKENDS, select_backend
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from tests.harness import run_distributed


def conform(rank: int, port: int) -> None:
    """Leave the harness's group, join one as a rank does by elastic's variables, and use it."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    backend = select_backend("cpu")
    backend.init_process_group(timeout_seconds=20.0)
    assert dist.get_backend() == backend.process_group_backend
    device = backend.device(rank)
    backend.set_device(device)
    can = backend.capabilities

    dtypes = [torch.float32, torch.int64]
    dtypes += [torch.bfloat16] * can.bf16 + [torch.float64] * can.fp64
    for dtype in dtypes:
        value = torch.full((3,), rank + 1, dtype=dtype, device=device)
        dist.all_reduce(value)
        assert value.tolist() == [3, 3, 3], dtype
    if can.native_average:
        value = torch.full((2,), float(rank), device=device)
        dist.all_reduce(value, dist.ReduceOp.AVG)
        assert value.tolist() == [0.5, 0.5]
    if can.uneven_all_to_all:
        send, receive = ([0, 3], [0, 1]) if rank == 0 else ([1, 2], [3, 2])
        rows = 10.0 * rank + torch.arange(float(sum(send)), device=device)
        received = rows.new_empty(sum(receive))
        dist.all_to_all_single(received, rows, receive, send)
        assert received.tolist() == ([10.0] if rank == 0 else [0.0, 1.0, 2.0, 11.0, 12.0])
    if can.bf16:
        ones = torch.ones(4, 4, dtype=torch.bfloat16, device=device)
        assert (ones @ ones).eq(4).all()
    backend.synchronize()


def test_the_host_conforms() -> None:
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    run_distributed(conform, 2, store.port)


def test_peak_memory_rises_with_an_allocation_and_resets() -> None:
    backend = select_backend("cpu")
    backend.reset_peak_memory()
    before = backend.peak_memory_bytes()
    torch.ones(64 << 20, dtype=torch.uint8)
    with_block = backend.peak_memory_bytes()
    assert with_block > before + (32 << 20)
    backend.reset_peak_memory()
    assert backend.peak_memory_bytes() < with_block - (32 << 20)


def test_random_numbers_continue_from_a_state() -> None:
    backend = select_backend("cpu")
    before = backend.rng_state()
    backend.manual_seed(3)
    torch.rand(5)
    state = backend.rng_state()
    expected = torch.rand(5)
    backend.set_rng_state(state)
    assert torch.equal(torch.rand(5), expected)
    backend.set_rng_state(before)


def plan(rank: int) -> tuple[list[int], int]:
    dist.destroy_process_group()
    os.environ.update(RANK="1000", WORLD_SIZE="2048")
    backend = select_backend("dry")
    backend.init_process_group(timeout_seconds=1.0)
    assert backend.device(0).type == "meta"
    meshes = build_mesh(ParallelLayout(data=2048, expert=64), backend.device_type)
    return dist.get_process_group_ranks(meshes.ep.get_group()), meshes.expert_shard.size()


def test_dry_stands_for_any_rank_of_a_large_world() -> None:
    ((experts, data),) = run_distributed(plan, 1)
    assert experts == list(range(960, 1024))
    assert data == 32


@pytest.mark.parametrize("name", ["cuda", "ascend", "cambricon"])
def test_an_absent_device_is_refused_with_the_reason_and_the_way_out(name: str) -> None:
    if BACKENDS[name]().is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(RuntimeError) as error:
        select_backend(name)
    message = str(error.value)
    assert message.startswith(f"parallel.backend={name}: backend {name} cannot be used here: ")
    assert re.search(r"Available: cpu, (.*, )?dry; set parallel.backend or MNEME_BACKEND", message)
