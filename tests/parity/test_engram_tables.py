"""Engram's tables in host memory against the same tables as parameters, and one rank's, in fp64."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.config import EngramTableConfig, ParallelConfig, PipelineSchedule
from parallel.layout import ParallelLayout
from tests.harness import more, run_distributed
from tests.parity.test_layouts import ADAMW, STEPS, recipe
from tests.parity.test_layouts_dsa import STAGES, sparse_recipe
from tests.parity.test_layouts_pipeline import (
    WITH_CONTEXT_2,
    WITH_TENSOR_2,
    in_pipeline,
    join,
    on_one_rank,
    state,
    with_layers,
)
from train.checkpoint.state import Progress
from train.config import RunConfig, StageConfig
from train.evaluate import evaluate
from train.loop import open_batches
from train.parity.memory import table_rows
from train.step import train_step
from train.training import Training

LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm", "validation/loss")
HOST = EngramTableConfig(storage="memory")


def in_host_memory(config: RunConfig, **keys: Any) -> RunConfig:
    tables = replace(HOST, **keys)
    return replace(config, parallel=replace(config.parallel, engram=tables))


def stack(
    corpus: Path, *, data: int = 1, expert: int = 1, micro: int = 2, rows_per_head: int = 50
) -> RunConfig:
    """Four layers, memory in the second and third, on tables in host memory."""
    config = with_layers(recipe(corpus, "mhc", data, expert, micro, ADAMW), 4)
    assert config.model.engram is not None
    memory = replace(config.model.engram, layers=(1, 2), rows_per_head=rows_per_head)
    config = replace(config, model=replace(config.model, engram=memory))
    return in_host_memory(config)


def tables(training: Training) -> dict[str, NDArray[Any]]:
    """Tables in host memory, by the names of those on the device; on one rank of each stage."""
    return {name: rows.numpy() for name, rows in table_rows(training).items()}


def train_rank(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    training = join(config)
    found: list[dict[str, Any]] = []
    for _, batch, _ in open_batches(training, Progress(step=0, tokens=0, data_state={})):
        record: dict[str, Any] = dict(train_step(training, batch, len(found) + 1))
        if len(found) == 1:
            record |= evaluate(training)
        record |= state(training)
        record["tables"] = tables(training)
        found.append(record)
    if training.memory is not None:
        training.memory.close()
    return found


def run(config: RunConfig) -> list[dict[str, Any]]:
    """Losses of each step, and all parameters and tables after it, under the same names."""
    world = ParallelLayout.from_config(config.parallel).world_size
    steps = []
    for records in zip(*run_distributed(train_rank, world, config, timeout=200.0), strict=True):
        merged = {
            name: value
            for name, value in records[0].items()
            if name in LOSSES or name.startswith("engram/")
        }
        assert all(record["loss"] == merged["loss"] for record in records)
        tensors: dict[str, NDArray[Any]] = {}
        for record in records:
            tensors |= record["parameters"]
            tensors |= record["tables"]
        steps.append(merged | {"tensors": tensors})
    return steps


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True), start=1):
        for name in LOSSES:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-12), (step, name)
        assert ours["engram/gate_mean"] == pytest.approx(theirs["engram/gate_mean"], rel=1e-12)
        assert ours["tensors"].keys() == theirs["tensors"].keys()
        for name, value in theirs["tensors"].items():
            assert np.abs(ours["tensors"][name] - value).max() <= 1e-10, (step, name)


@cache
def reference(corpus: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    return run(of_steps(on_one_rank_with_tables(stack(corpus)), steps))


def on_one_rank_with_tables(config: RunConfig) -> RunConfig:
    return in_host_memory(on_one_rank(config))


def test_lazy_adam_is_adamw_where_every_row_is_read_in_every_step(tiny_corpus: Path) -> None:
    """Two rows or a few more a head: a batch reads all. Two ranks, backward passes split, against
    one rank with the tables as parameters.
    """
    config = of_steps(stack(tiny_corpus, rows_per_head=2), 2)
    config = replace(config, model=replace(config.model, mtp_depth=0))
    found = run(in_pipeline(config, 2, "zbv"))
    assert_same(found, run(on_one_rank(config)))
    tables = [found[-1]["tensors"][f"layers.{layer}.engram.table.weight"] for layer in (1, 2)]
    assert all(np.abs(rows).min() > 1e-6 for rows in tables)
    assert found[-1]["engram/unique_row_fraction"] == sum(map(len, tables)) / (8 * 48 * 16)
    assert found[-1]["engram/fetch_seconds"] > 0


SPLIT: list[PipelineSchedule] = ["interleaved_zero_bubble", "zbv", "dualpipev"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "looped_bfs", *SPLIT])
def test_every_schedule(tiny_corpus: Path, schedule: PipelineSchedule) -> None:
    found = run(in_pipeline(stack(tiny_corpus), 2, schedule))
    assert_same(found, reference(tiny_corpus))


LAYOUTS = [
    more(2, 1, 2, {}),
    (4, 2, 1, {}),
    more(3, 1, 1, {}),
    (1, 1, 2, WITH_TENSOR_2),
    (1, 1, 2, WITH_CONTEXT_2),
    more(1, 1, 2, WITH_CONTEXT_2 | {"context_split": "contiguous"}),
    (1, 2, 4, WITH_TENSOR_2 | WITH_CONTEXT_2),
    (2, 2, 1, {"data_replicate_parallel_size": 2}),
    more(2, 2, 2, WITH_TENSOR_2 | {"expert_sharding": "replicate"}),
    more(2, 1, 2, {"reshard_after_forward": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "expert", "micro", "keys"), LAYOUTS)
def test_other_layouts(
    tiny_corpus: Path, data: int, expert: int, micro: int, keys: dict[str, Any]
) -> None:
    config = stack(tiny_corpus, data=data, expert=expert, micro=micro)
    config = replace(config, parallel=replace(config.parallel, **keys))
    if data == 3:
        train = replace(config.train, global_batch_size=6)
        config = replace(config, train=train, evaluate=replace(config.evaluate, num_sequences=6))
    wanted = reference(tiny_corpus) if data != 3 else run(on_one_rank_with_tables(config))
    assert_same(run(config), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "schedule", "data", "keys"),
    [
        (4, "1f1b", 1, {}),
        more(2, "zbv", 2, {}),
        (2, "1f1b", 2, WITH_CONTEXT_2),
        more(2, "interleaved_1f1b", 1, WITH_TENSOR_2),
        more(2, "dualpipev", 1, WITH_TENSOR_2 | WITH_CONTEXT_2),
        (2, "zbv", 1, {"pipeline_layers": (1, 1, 1, 1), "data_replicate_parallel_size": 2}),
    ],
)
def test_pipelines_with_other_axes(
    tiny_corpus: Path, ranks: int, schedule: PipelineSchedule, data: int, keys: dict[str, Any]
) -> None:
    found = run(in_pipeline(stack(tiny_corpus, data=data, micro=1), ranks, schedule, **keys))
    assert_same(found, reference(tiny_corpus))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streams", "full"])
def test_blocks_that_are_computed_again(tiny_corpus: Path, kind: Any) -> None:
    config = stack(tiny_corpus, data=2, micro=1)
    config = replace(config, train=replace(config.train, recompute=kind))
    assert_same(run(config), reference(tiny_corpus))
    assert_same(run(in_pipeline(config, 2, "interleaved_1f1b")), reference(tiny_corpus))


@pytest.mark.slow
def test_a_frozen_model_changes_no_rows(tiny_corpus: Path) -> None:
    """Sparse attention that idles, warms up with all else frozen, and selects."""
    stages = tuple(StageConfig(steps=1, indexer_stage=stage) for stage in STAGES)
    config = in_host_memory(with_layers(sparse_recipe(tiny_corpus, 2, 1, 2), 4))
    config = replace(config, train=replace(config.train, stages=stages))
    found = run(config)
    assert_same(found, run(on_one_rank_with_tables(config)))
    rows = [record["tensors"]["layers.1.engram.table.weight"] for record in found]
    for step in range(1, len(STAGES)):
        same = np.array_equal(rows[step], rows[step - 1])
        assert same == (STAGES[step] == "dense_warmup"), step


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_bf16_rows_and_gradients_are_those_of_one_rank(
    tiny_corpus: Path, schedule: PipelineSchedule
) -> None:
    """A microbatch of the same size has the same gradients, and their order is that of the places."""
    config = stack(tiny_corpus, micro=1)
    config = replace(config, train=replace(config.train, dtype="bf16"))
    wanted = run(replace(config, parallel=ParallelConfig(engram=HOST)))
    found = run(in_pipeline(config, 2, schedule))
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs["tensors"].items():
            assert np.array_equal(ours["tensors"][name], value), name


def of_steps(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, train=replace(config.train, steps=steps))
