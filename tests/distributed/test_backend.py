"""A world without peers, and devices that are not there; see test_conformance for what is there."""

import os
import re

import pytest
import torch.distributed as dist

from parallel.backend.select import BACKENDS, select_backend
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from tests.harness import run_distributed


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
