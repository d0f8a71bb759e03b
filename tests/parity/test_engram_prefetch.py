"""Exact prefetch changes nothing, bit for bit; stale prefetch does, so that a test would notice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from parallel.config import (
    EngramPrefetch,
    EngramRowDtype,
    EngramTableConfig,
    ParallelConfig,
)
from parallel.layout import ParallelLayout
from tests.harness import run_distributed
from tests.parity.test_engram_tables import tables
from tests.parity.test_layouts_pipeline import join
from train.checkpoint.state import Progress
from train.config import EngramOptimizer, OptimConfig, RunConfig, TrainConfig
from train.loop import open_batches
from train.model.config import EngramConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step


def recipe(corpus: Path, steps: int, *, layers: int = 2, **parallel: Any) -> RunConfig:
    sources = {"code": SourceConfig(path=str(corpus / "code"))}
    sequences = 4 // parallel.get("data_parallel_size", 1)
    microbatches = parallel.get("pipeline_parallel_size", 1)
    return RunConfig(
        name="prefetch",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=16,
            num_layers=layers,
            num_dense_layers=layers - 1,
            intermediate_size=32,
            residual="plain",
            moe=MoeConfig(num_experts=4, expert_intermediate_size=8),
            engram=EngramConfig(layers=tuple(range(layers)), rows_per_head=50, head_dim=4),
        ),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(
            sources=sources, tokenizer=str(corpus / "tokenizer.json"), sequence_length=24
        ),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(
            steps=steps,
            global_batch_size=4,
            micro_batch_size=sequences // microbatches,
        ),
    )


Trace = tuple[list[float], dict[str, bytes], float]
"""Losses, tables at the end, and the fraction of rows that had to wait for the step before."""


def train_rank(rank: int, configs: list[RunConfig]) -> list[Trace]:
    return [train_one(config) for config in configs]


def train_one(config: RunConfig) -> Trace:
    training = join(config)
    losses, late = [], 0.0
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    for step, (_, batch, _) in enumerate(batches, start=1):
        record = train_step(training, batch, step)
        losses.append(float(record["loss"]))
        late += record["engram/late_row_fraction"] / config.train.steps
    found = {name: rows.tobytes() for name, rows in tables(training).items()}
    if training.memory is not None:
        training.memory.close()
    return losses, found, late


def run(
    config: RunConfig,
    *prefetch: EngramPrefetch,
    dtype: EngramRowDtype = "fp32",
    optimizer: EngramOptimizer = "adam",
) -> list[Trace]:
    """A run with each kind of prefetch, on the same ranks."""
    optim = replace(config.optim, engram_optimizer=optimizer)
    configs = []
    for kind in prefetch:
        host = EngramTableConfig(storage="memory", prefetch=kind, dtype=dtype)
        parallel = replace(config.parallel, engram=host)
        configs.append(replace(config, parallel=parallel, optim=optim))
    world = ParallelLayout.from_config(config.parallel).world_size
    traces = []
    for of_ranks in zip(*run_distributed(train_rank, world, configs, timeout=500.0), strict=True):
        losses, _, late = of_ranks[0]
        assert all(of_rank[0] == losses for of_rank in of_ranks)
        rows = {name: values for _, found, _ in of_ranks for name, values in found.items()}
        assert len(rows) == config.model.num_layers
        traces.append((losses, rows, late))
    return traces


def assert_exact(config: RunConfig, **keys: Any) -> None:
    off, exact, stale = run(config, "off", "exact", "stale", **keys)
    assert exact[:2] == off[:2]
    assert 0.1 < exact[2] < 0.9
    assert stale[0] != off[0]
    assert all(stale[1][name] != rows for name, rows in off[1].items())


def test_a_few_steps_on_two_ranks_are_bitwise_those_without_prefetch(tiny_corpus: Path) -> None:
    assert_exact(recipe(tiny_corpus, 4, data_parallel_size=2))


LAYOUTS = [
    {"data_parallel_size": 2},
    {"data_parallel_size": 4, "expert_parallel_size": 2},
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"pipeline_parallel_size": 2, "data_parallel_size": 2},
    {"context_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_are_bitwise_those_without_prefetch(
    tiny_corpus: Path, layout: dict[str, int]
) -> None:
    # A step of four ranks on two cores takes a sixth of a second for each block and microbatch.
    layers = 1 if "context_parallel_size" in layout else 2
    assert_exact(recipe(tiny_corpus, 50, layers=layers, **layout))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "optimizer"), [("bf16", "adam"), ("fp8", "adagrad"), ("fp32", "sinkhorn")]
)
def test_other_rows_and_optimizers(
    tiny_corpus: Path, dtype: EngramRowDtype, optimizer: EngramOptimizer
) -> None:
    config = recipe(tiny_corpus, 50, data_parallel_size=2)
    assert_exact(config, dtype=dtype, optimizer=optimizer)
