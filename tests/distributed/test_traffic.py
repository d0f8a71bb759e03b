"""What a rank sends in a step: our counters, what torch was asked to send, and the arithmetic."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from data.config import DataConfig, SourceConfig
from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.config import EngramTableConfig, ParallelConfig
from parallel.mesh import Meshes
from parallel.traffic import take_sent
from parallel.volume import Axis
from tests.harness import run_distributed
from train.build import build
from train.config import OptimConfig, RunConfig, TrainConfig
from train.model.attention.config import CompressedConfig, IndexerConfig
from train.model.config import EngramConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step
from train.volume import RoutedRows, step_volume

ADAMW = OptimConfig(warmup_steps=0)
MUON = OptimConfig(warmup_steps=0, optimizer="muon", table_optimizer="sinkhorn")


class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that this rank sends by the name of the group, as the operations of c10d have them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
            return float(sum(2 * x.nbytes * (ranks - 1) / ranks for x in given["tensors"]))
        case "broadcast_":  # a mean over the ranks, the last of which sends nothing
            return float(sum(x.nbytes * (ranks - 1) / ranks for x in given["tensors"]))
        case "alltoall_base_":
            x, splits = given["input"], given["input_split_sizes"]
            own = splits[rank] if splits else len(x) // ranks
            return float((len(x) - own) * x.shape[1:].numel() * x.element_size())
        case "send":
            return float(sum(x.nbytes for x in given["tensors"]))
        case "recv_" | "recv_any_source_":
            return 0.0
    raise AssertionError(f"an operation that nobody counts: {name}")


def recipe(
    corpus: Path,
    parallel: ParallelConfig,
    *,
    optim: OptimConfig = ADAMW,
    sequences: int = 4,
    layers: int = 2,
    micro: int = 1,
    dtype: str = "bf16",
    recompute: str = "none",
    **model: Any,
) -> RunConfig:
    return RunConfig(
        name="traffic",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=layers,
            intermediate_size=64,
            moe=MoeConfig(num_experts=4, expert_intermediate_size=16),
            engram=EngramConfig(rows_per_head=50, head_dim=8),
            mtp_depth=1,
            indexer=IndexerConfig(num_heads=2, head_dim=16, top_k=6),
            compressed=CompressedConfig(compress_ratios=(4, 16, 0, 4, 4)),
            **model,
        ),
        parallel=parallel,
        data=DataConfig(
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("code", "docs")},
            tokenizer=str(corpus / "tokenizer.json"),
            sequence_length=64,
        ),
        optim=optim,
        train=TrainConfig(
            steps=2,
            global_batch_size=sequences,
            micro_batch_size=micro,
            dtype=dtype,  # type: ignore[arg-type]
            recompute=recompute,  # type: ignore[arg-type]
        ),
    )


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a step."""

    sent: dict[Axis, float]
    """By our counters."""
    wire: Counter[str]
    groups: dict[Axis, set[str]]
    """Names of the process groups that count for each axis."""
    routed: Counter[int]
    """Rows for the experts of each global rank."""


def observe(rank: int, configs: list[RunConfig]) -> list[Seen]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return [observe_step(config) for config in configs]


def observe_step(config: RunConfig) -> Seen:
    """The second step, in which nothing happens for the first time."""
    training = build(config)
    batches = build_loader(
        config.data,
        split="train",
        seed=0,
        global_batch_size=config.train.global_batch_size,
        data_rank=training.data_rank,
        data_size=training.data_size,
    )
    train_step(training, next(batches)[0], 1)
    ranks = get_process_group_ranks(training.meshes.ep.get_group())
    per_rank = config.model.moe.num_experts // len(ranks)
    routed: Counter[int] = Counter()

    def count(router: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        owners = (output[0].flatten() // per_rank).tolist()
        routed.update(ranks[owner] for owner in owners)

    for layer in training.model.moe_layers():
        layer.router.register_forward_hook(count)
    take_sent()
    with Wire() as wire:
        train_step(training, next(batches)[0], 2)
    return Seen(take_sent(), wire.sent, groups(training.meshes), routed)


def groups(meshes: Meshes) -> dict[Axis, set[str]]:
    dense = [meshes.stage_shard, meshes.tensor_shard, meshes.stage]
    members: dict[Axis, list[ProcessGroup]] = {
        "dp": [group for mesh in dense for group in mesh.get_all_groups()],
        "edp": meshes.expert_shard.get_all_groups(),
        "ep": [meshes.ep.get_group()],
        "tp": [meshes.tp.get_group()],
        "cp": [],
        "pp": [meshes.pp.get_group()],
        "world": [meshes.world.get_group()],
    }
    members["cp" if meshes.cp.size() > 1 else "tp"].append(meshes.sequence.get_group())
    return {axis: {group.group_name for group in found} for axis, found in members.items()}


def check(config: RunConfig, ranks: list[Seen]) -> None:
    """Counters against c10d, and against the arithmetic, on every rank."""
    forwards = 2 if config.train.recompute == "full" else 1
    for rank, seen in enumerate(ranks):
        for axes, names in joined(seen.groups):
            counted = sum(seen.sent[axis] for axis in axes)
            assert counted == pytest.approx(sum(seen.wire[name] for name in names), abs=1), axes
        assert sum(seen.sent.values()) == pytest.approx(seen.wire.total(), abs=1)
        leaving = seen.routed.total() - seen.routed[rank]
        arriving = sum(other.routed[rank] for other in ranks) - seen.routed[rank]
        rows = RoutedRows(leaving=leaving / forwards, arriving=arriving / forwards)
        predicted = step_volume(config, rank, routed=rows)
        for axis, num_bytes in seen.sent.items():
            assert num_bytes == pytest.approx(predicted[axis], rel=1e-12), (rank, axis)


def joined(groups: dict[Axis, set[str]]) -> list[tuple[set[Axis], set[str]]]:
    """Axes that share a group, together: small worlds have fewer groups than purposes."""
    found: list[tuple[set[Axis], set[str]]] = []
    for axis, names in groups.items():
        touching = [pair for pair in found if pair[1] & names]
        found = [pair for pair in found if pair not in touching]
        axes = {axis}.union(*(pair[0] for pair in touching))
        found.append((axes, names.union(*(pair[1] for pair in touching))))
    return found


TWO: dict[str, dict[str, Any]] = {
    "dp2 ep2, tables in host memory": {
        "parallel": ParallelConfig(
            data_parallel_size=2,
            expert_parallel_size=2,
            engram=EngramTableConfig(storage="memory"),
        )
    },
    "cp2": {
        "parallel": ParallelConfig(context_parallel_size=2),
        "recompute": "full",
        "sequences": 1,
    },
    "tp2": {"parallel": ParallelConfig(tensor_parallel_size=2), "sequences": 1, "dtype": "fp64"},
    "pp2": {"parallel": ParallelConfig(pipeline_parallel_size=2), "sequences": 2},
}
TWO_MORE: dict[str, dict[str, Any]] = {
    "dp2 recomputed, kept, muon": {
        "parallel": ParallelConfig(data_parallel_size=2, reshard_after_forward=False),
        "recompute": "full",
        "optim": MUON,
    },
    "cp2 hybrid": {
        "parallel": ParallelConfig(context_parallel_size=2),
        "attention": "v4_hybrid",
        "dtype": "fp64",
    },
    "tp2 ep2 dsa": {
        "parallel": ParallelConfig(tensor_parallel_size=2, expert_parallel_size=2),
        "attention": "dsa",
        "recompute": "full",
        "micro": 2,
    },
}


FOUR: dict[str, dict[str, Any]] = {
    "dp2 tp2 ep2 hybrid": {
        "parallel": ParallelConfig(
            data_parallel_size=2, tensor_parallel_size=2, expert_parallel_size=2
        ),
        "attention": "v4_hybrid",
        "optim": MUON,
    },
    "dp2 cp2 ep4 dsa": {
        "parallel": ParallelConfig(
            data_parallel_size=2,
            context_parallel_size=2,
            context_split="contiguous",
            expert_parallel_size=4,
        ),
        "attention": "dsa",
        "recompute": "streams",
    },
    "cp2 tp2 mla": {
        "parallel": ParallelConfig(context_parallel_size=2, tensor_parallel_size=2),
        "dtype": "fp32",
        "micro": 2,
    },
    "copies 2, dp2, whole experts": {
        "parallel": ParallelConfig(
            data_replicate_parallel_size=2,
            data_parallel_size=2,
            expert_parallel_size=2,
            expert_sharding="replicate",
        ),
        "optim": MUON,
    },
    "pp2 dp2 1f1b": {
        "parallel": ParallelConfig(
            pipeline_parallel_size=2, data_parallel_size=2, pipeline_layers=(2, 1)
        ),
        "sequences": 12,
        "layers": 3,
        "residual": "mhc_single_pass",
    },
    "pp2 dp2 ep2 interleaved": {
        "parallel": ParallelConfig(
            pipeline_parallel_size=2,
            data_parallel_size=2,
            expert_parallel_size=2,
            pipeline_schedule="interleaved_1f1b",
            pipeline_stages_per_rank=2,
        ),
        "sequences": 8,
        "layers": 4,
    },
    "pp2 dp2 breadth first": {
        "parallel": ParallelConfig(
            pipeline_parallel_size=2,
            data_parallel_size=2,
            pipeline_schedule="looped_bfs",
            pipeline_stages_per_rank=2,
        ),
        "sequences": 6,
        "layers": 4,
        "optim": MUON,
    },
    "pp2 tp2 ep2 zero bubbles": {
        "parallel": ParallelConfig(
            pipeline_parallel_size=2,
            tensor_parallel_size=2,
            expert_parallel_size=2,
            pipeline_schedule="zbv",
            pipeline_stages_per_rank=2,
            reshard_after_forward=False,
        ),
        "layers": 4,
        "attention": "dsa",
    },
    "copies 2, tp2": {
        "parallel": ParallelConfig(data_replicate_parallel_size=2, tensor_parallel_size=2),
        "attention": "v4_hybrid",
        "recompute": "full",
        "optim": MUON,
    },
}


def compare(corpus: Path, ranks: int, cases: dict[str, dict[str, Any]]) -> None:
    configs = [recipe(corpus, **case) for case in cases.values()]
    seen = run_distributed(observe, ranks, configs, timeout=300.0)
    for index, config in enumerate(configs):
        check(config, [of_rank[index] for of_rank in seen])


def test_two_ranks_send_what_is_counted_and_predicted(tiny_corpus: Path) -> None:
    compare(tiny_corpus, 2, TWO)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_MORE), (4, FOUR)], ids=["two", "four"])
def test_more_layouts_send_what_is_counted_and_predicted(
    tiny_corpus: Path, ranks: int, cases: dict[str, dict[str, Any]]
) -> None:
    compare(tiny_corpus, ranks, cases)
