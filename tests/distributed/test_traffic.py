"""What a rank sends in a step: our counters, what torch was asked to send, and the arithmetic."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from data.config import DataConfig, SourceConfig
from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from parallel.mesh import Meshes
from parallel.traffic import take_sent
from tests.harness import run_distributed
from train.build import build
from train.config import OptimConfig, RunConfig, TrainConfig
from train.model.config import EngramConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step

SEQUENCES = 4


class Wire(TorchDispatchMode):
    """Bytes that this rank sends by the name of the group, as the operations of c10d have them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, places = func._schema.name.removeprefix("c10d::"), func._schema.arguments
            given = dict(zip((argument.name for argument in places), args, strict=False))
            group = ProcessGroup.unbox(given["process_group"])
            self.sent[group.group_name] += round(_sent(name, given, group.rank(), group.size()))
        return func(*args, **(kwargs or {}))


def _sent(name: str, given: dict[str, Any], rank: int, ranks: int) -> float:
    match name:
        case "_allgather_base_":
            return float(given["input_tensor"].nbytes * (ranks - 1))
        case "_reduce_scatter_base_":
            return float(given["output_tensor"].nbytes * (ranks - 1))
        case "allreduce_":
            return sum(2 * x.nbytes * (ranks - 1) / ranks for x in given["tensors"])
        case "alltoall_base_":
            x, splits = given["input"], given["input_split_sizes"]
            own = splits[rank] if splits else len(x) // ranks
            return float((len(x) - own) * x.shape[1:].numel() * x.element_size())
        case "send":
            return float(sum(x.nbytes for x in given["tensors"]))
        case "recv_" | "recv_any_source_":
            return 0.0
    raise AssertionError(f"an operation that nobody counts: {name}")


def recipe(corpus: Path, parallel: ParallelConfig, **model: Any) -> RunConfig:
    return RunConfig(
        name="traffic",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=3,
            intermediate_size=64,
            moe=MoeConfig(num_experts=4, expert_intermediate_size=16),
            engram=EngramConfig(rows_per_head=50, head_dim=8),
            mtp_depth=1,
            **model,
        ),
        parallel=parallel,
        data=DataConfig(
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("code", "docs")},
            tokenizer=str(corpus / "tokenizer.json"),
            sequence_length=48,
        ),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(steps=2, global_batch_size=SEQUENCES, micro_batch_size=1, dtype="bf16"),
    )


def groups(meshes: Meshes) -> dict[str, set[str]]:
    """Names of the process groups that count for each axis."""
    dp = [meshes.stage_shard, meshes.tensor_shard]
    both = "cp" if meshes.cp.size() > 1 else "tp"
    members = {
        "dp": [group for mesh in dp for group in mesh.get_all_groups()],
        "edp": meshes.expert_shard.get_all_groups(),
        "ep": [meshes.ep.get_group()],
        "tp": [meshes.tp.get_group()],
        "cp": [],
        "pp": [meshes.pp.get_group()],
        "world": [meshes.world.get_group()],
    }
    members[both].append(meshes.sequence.get_group())
    return {axis: {group.group_name for group in found} for axis, found in members.items()}


def observe(rank: int, configs: list[RunConfig]) -> list[Any]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    found = []
    for config in configs:
        training = build(config)
        batches = build_loader(
            config.data,
            split="train",
            seed=0,
            global_batch_size=SEQUENCES,
            data_rank=training.data_rank,
            data_size=training.data_size,
        )
        train_step(training, next(batches)[0], 1)
        take_sent()
        with Wire() as wire:
            train_step(training, next(batches)[0], 2)
        found.append((take_sent(), wire.sent, groups(training.meshes)))
    return found


def test_x(tiny_corpus):
    configs = [
        recipe(tiny_corpus, p)
        for p in (
            ParallelConfig(data_parallel_size=2, expert_parallel_size=2),
            ParallelConfig(context_parallel_size=2),
        )
    ]
    import pprint

    pprint.pprint(run_distributed(observe, 2, configs))
