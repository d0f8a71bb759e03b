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


def recipe(corpus: Path, steps: int, **parallel: Any) -> RunConfig:
    sources = {"code": SourceConfig(path=str(corpus / "code"))}
    return RunConfig(
        name="prefetch",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=16,
            num_layers=2,
            intermediate_size=32,
            residual="plain",
            moe=MoeConfig(num_experts=4, expert_intermediate_size=8),
            engram=EngramConfig(layers=(0, 1), rows_per_head=50, head_dim=4),
        ),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(
            sources=sources, tokenizer=str(corpus / "tokenizer.json"), sequence_length=24
        ),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(steps=steps, global_batch_size=4, micro_batch_size=1),
    )


def train_rank(rank: int, config: RunConfig) -> tuple[list[float], dict[str, bytes], float]:
    training = join(config)
    losses, late = [], 0.0
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    for step, (_, batch, _) in enumerate(batches, start=1):
        record = train_step(training, batch, step)
        losses.append(float(record["loss"]))
        late += record["engram/late_row_fraction"] / config.train.steps
    found = {name: rows.tobytes() for name, rows in tables(training).items()}
    assert training.memory is not None
    training.memory.close()
    return losses, found, late


Trace = tuple[list[float], dict[str, bytes], float]


def run(
    config: RunConfig,
    prefetch: EngramPrefetch,
    dtype: EngramRowDtype = "fp32",
    optimizer: EngramOptimizer = "adam",
) -> Trace:
    """Losses, tables at the end, and the fraction of rows that had to wait for the step before."""
    host = EngramTableConfig(storage="memory", prefetch=prefetch, dtype=dtype)
    config = replace(
        config,
        parallel=replace(config.parallel, engram=host),
        optim=replace(config.optim, engram_optimizer=optimizer),
    )
    world = ParallelLayout.from_config(config.parallel).world_size
    found = run_distributed(train_rank, world, config, timeout=200.0)
    assert all(losses == found[0][0] for losses, _, _ in found)
    return found[0][0], {k: v for _, of_rank, _ in found for k, v in of_rank.items()}, found[0][2]


def assert_equal_to_off(config: RunConfig, **keys: Any) -> None:
    losses, rows, late = run(config, "exact", **keys)
    assert (losses, rows) == run(config, "off", **keys)[:2]
    assert len(rows) == 2
    assert 0.1 < late < 0.9


def test_a_few_steps_on_two_ranks_are_bitwise_those_without_prefetch(tiny_corpus: Path) -> None:
    config = recipe(tiny_corpus, 4, data_parallel_size=2)
    assert_equal_to_off(config)
    exact, stale = run(config, "exact"), run(config, "stale")
    assert exact[0] != stale[0]
    assert exact[1] != stale[1]


LAYOUTS = [
    {"data_parallel_size": 2},
    {"data_parallel_size": 4, "expert_parallel_size": 2},
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"pipeline_parallel_size": 2, "data_parallel_size": 2},
    {"context_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4},
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_are_bitwise_those_without_prefetch(
    tiny_corpus: Path, layout: dict[str, int]
) -> None:
    config = recipe(tiny_corpus, 50, **layout)
    assert_equal_to_off(config)
    assert run(config, "stale")[0] != run(config, "off")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "optimizer"), [("bf16", "adam"), ("fp8", "adagrad"), ("fp32", "sinkhorn")]
)
def test_other_rows_and_optimizers(
    tiny_corpus: Path, dtype: EngramRowDtype, optimizer: EngramOptimizer
) -> None:
    config = recipe(tiny_corpus, 50, data_parallel_size=2)
    assert_equal_to_off(config, dtype=dtype, optimizer=optimizer)
