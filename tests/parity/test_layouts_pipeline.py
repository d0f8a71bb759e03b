"""The whole V4 stack in a pipeline: the numbers of one rank in fp64, whatever the schedule."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.layout import ParallelLayout
from parallel.pipeline_stages import SPLIT_BACKWARD
from tests.harness import more, run_distributed
from tests.parity import test_image_layouts
from tests.parity.test_layouts import ADAMW, MUON, recipe, whole
from tests.parity.test_layouts_dsa import STAGES, sparse_recipe
from tests.parity.test_layouts_hybrid import hybrid_recipe
from train.build import build
from train.checkpoint.state import Progress
from train.config import BatchSizeRampConfig, OptimConfig, RunConfig, StageConfig
from train.evaluate import evaluate
from train.loop import batch_shape, open_batches
from train.model.config import Recompute
from train.pipeline_rules import problems
from train.step import train_step
from train.training import Training

TENSORS = ("parameters", "bias")


def with_layers(config: RunConfig, layers: int, **model: Any) -> RunConfig:
    return replace(config, model=replace(config.model, num_layers=layers, **model))


def in_pipeline(
    config: RunConfig, ranks: int, schedule: PipelineSchedule = "1f1b", **keys: Any
) -> RunConfig:
    keys = {
        "pipeline_parallel_size": ranks,
        "pipeline_schedule": schedule,
        "pipeline_stages_per_rank": 1 if schedule == "1f1b" else 2,
        "reshard_after_forward": schedule not in SPLIT_BACKWARD,
    } | keys
    return replace(config, parallel=replace(config.parallel, **keys))


def on_one_rank(config: RunConfig) -> RunConfig:
    """The same run, a whole batch at a time."""
    stages = tuple(replace(stage, micro_batch_size=None) for stage in config.train.stages)
    micro = config.train.global_batch_size
    train = replace(config.train, micro_batch_size=micro, stages=stages)
    return replace(config, parallel=ParallelConfig(), train=train)


def join(config: RunConfig) -> Training:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return build(config)


def state(training: Training) -> dict[str, dict[Any, Any]]:
    """Parameters and biases of this rank's stages."""
    model = training.model
    return {
        "parameters": {name: whole(value) for name, value in model.named_parameters()},
        "bias": {
            moe.place: moe.expert_bias.numpy().copy()
            for moe in model.moe_layers()
            if moe.expert_bias is not None
        },
    }


def train_rank(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    training = join(config)
    start = Progress(step=0, tokens=0, data_state={})
    found: list[dict[str, Any]] = []
    for phase, batch, _ in open_batches(training, start):
        record: dict[str, Any] = dict(train_step(training, batch, len(found) + 1))
        record |= batch_shape(phase)
        if len(found) == 1:
            record |= evaluate(training)
        found.append(record | state(training))
    return found


def train_on_images(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    training = join(config)
    return [
        train_step(training, test_image_layouts.own_part(training, step), step) | state(training)
        for step in (1, 2)
    ]


Rank = Callable[[int, RunConfig], list[dict[str, Any]]]


def run(config: RunConfig, rank: Rank = train_rank) -> list[dict[str, Any]]:
    """One trace of all ranks: each has the tensors of its own stages, and all the same numbers."""
    assert list(problems(config)) == []
    world = ParallelLayout.from_config(config.parallel).world_size
    steps = []
    for records in zip(*run_distributed(rank, world, config, timeout=200.0), strict=True):
        numbers = [{k: v for k, v in record.items() if k not in TENSORS} for record in records]
        assert all(of_rank == numbers[0] for of_rank in numbers)
        tensors: dict[str, Any] = {
            key: {name: value for record in records for name, value in record[key].items()}
            for key in TENSORS
        }
        steps.append(numbers[0] | tensors)
    return steps


def assert_same(found: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, reference, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - set(TENSORS):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["bias"].keys() == theirs["bias"].keys()
        for place, bias in theirs["bias"].items():
            assert np.array_equal(ours["bias"][place], bias), place
        assert ours["parameters"].keys() == theirs["parameters"].keys()
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)


def assert_bitwise(found: list[dict[str, Any]], again: list[dict[str, Any]]) -> None:
    for first, second in zip(found, again, strict=True):
        for name in first.keys() - set(TENSORS):
            assert first[name] == second[name], name
        for key in TENSORS:
            for name, value in first[key].items():
                assert np.array_equal(value, second[key][name]), (key, name)


def stack(
    corpus: Path, residual: str, data: int = 1, expert: int = 1, optim: OptimConfig = ADAMW
) -> RunConfig:
    """Four layers, the first dense, memory in the second and third; MTP of V3, or of V4."""
    config = with_layers(recipe(corpus, residual, data, expert, 2, optim), 4)
    assert config.model.engram is not None
    model = replace(config.model, engram=replace(config.model.engram, layers=(1, 2)))
    train = replace(config.train, micro_batch_size=2 // data)
    return replace(config, model=model, train=train)


@cache
def reference(corpus: Path, residual: str, optim: OptimConfig = ADAMW) -> list[dict[str, Any]]:
    return run(on_one_rank(stack(corpus, residual, optim=optim)))


def of_two_steps(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, steps=2))


def test_pipelines_compute_what_one_rank_does(tiny_corpus: Path) -> None:
    """Uneven stages; and stages in a V whose backward passes are split."""
    wanted = run(on_one_rank(of_two_steps(stack(tiny_corpus, "mhc_single_pass"))))
    uneven = in_pipeline(stack(tiny_corpus, "mhc_single_pass"), 2, pipeline_layers=(3, 1))
    assert_same(run(of_two_steps(uneven)), wanted)
    in_a_v = in_pipeline(stack(tiny_corpus, "mhc_single_pass"), 2, "dualpipev")
    assert_same(run(of_two_steps(in_a_v)), wanted)


ALL: list[PipelineSchedule] = [
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv",
    "dualpipev",
]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ALL)
def test_every_schedule_computes_what_one_rank_does_and_again(
    tiny_corpus: Path, schedule: PipelineSchedule
) -> None:
    config = in_pipeline(stack(tiny_corpus, "mhc"), 2, schedule)
    found = run(config)
    assert_same(found, reference(tiny_corpus, "mhc"))
    assert_bitwise(found, run(config))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [more("1f1b"), "interleaved_zero_bubble", more("dualpipev")])
@pytest.mark.parametrize("residual", ["plain", "hc", "mhc_single_pass"])
def test_other_residuals(tiny_corpus: Path, residual: str, schedule: PipelineSchedule) -> None:
    config = in_pipeline(stack(tiny_corpus, residual), 2, schedule)
    assert_same(run(config), reference(tiny_corpus, residual))


WITH_TENSOR_2 = {"tensor_parallel_size": 2}
WITH_CONTEXT_2 = {"context_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "schedule", "data", "expert", "keys"),
    [
        more(2, "1f1b", 2, 2, {}),
        (2, "interleaved_1f1b", 2, 1, {}),
        (2, "dualpipev", 2, 2, {}),
        more(2, "zbv", 2, 2, {}),
        more(2, "looped_bfs", 2, 2, {"reshard_after_forward": False}),
        (4, "1f1b", 1, 1, {}),
        (4, "1f1b", 2, 2, {}),
        more(4, "looped_bfs", 1, 1, {"pipeline_stages_per_rank": 1}),
        (2, "dualpipev", 1, 2, {"data_replicate_parallel_size": 2}),
        more(2, "1f1b", 2, 1, {"expert_sharding": "replicate"}),
        (2, "1f1b", 1, 1, WITH_TENSOR_2),
        (2, "zbv", 1, 2, WITH_TENSOR_2),
        more(2, "interleaved_1f1b", 1, 2, WITH_CONTEXT_2),
        (2, "1f1b", 2, 4, WITH_CONTEXT_2),
        (2, "dualpipev", 1, 2, WITH_TENSOR_2 | WITH_CONTEXT_2),
    ],
)
def test_with_other_axes(
    tiny_corpus: Path,
    ranks: int,
    schedule: PipelineSchedule,
    data: int,
    expert: int,
    keys: dict[str, Any],
) -> None:
    config = stack(tiny_corpus, "mhc", data, expert)
    if "data_replicate_parallel_size" in keys:
        config = replace(config, train=replace(config.train, micro_batch_size=1))
    found = run(in_pipeline(config, ranks, schedule, **keys))
    assert_same(found, reference(tiny_corpus, "mhc"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streams", "full"])
def test_stages_compute_again_in_backward(tiny_corpus: Path, kind: Recompute) -> None:
    config = in_pipeline(stack(tiny_corpus, "mhc"), 2, "interleaved_1f1b")
    config = replace(config, train=replace(config.train, recompute=kind))
    assert_same(run(config), reference(tiny_corpus, "mhc"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "data", "keys"), [("interleaved_1f1b", 1, WITH_TENSOR_2), ("zbv", 2, {})]
)
def test_muon_on_stages(
    tiny_corpus: Path, schedule: PipelineSchedule, data: int, keys: dict[str, Any]
) -> None:
    config = in_pipeline(stack(tiny_corpus, "mhc", data, data, MUON), 2, schedule, **keys)
    assert_same(run(config), reference(tiny_corpus, "mhc", MUON))


def through_its_stages(config: RunConfig) -> RunConfig:
    """Sparse attention that idles, warms up with all else frozen, and selects."""
    stages = tuple(StageConfig(steps=1, indexer_stage=stage) for stage in STAGES)
    return replace(config, train=replace(config.train, stages=stages))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "keys"),
    [
        ("1f1b", {}),
        ("dualpipev", {}),
        ("zbv", WITH_CONTEXT_2),
        more("zbv", WITH_TENSOR_2 | {"expert_parallel_size": 2}),
    ],
)
def test_sparse_attention_through_its_stages(
    tiny_corpus: Path, schedule: PipelineSchedule, keys: dict[str, Any]
) -> None:
    config = through_its_stages(with_layers(sparse_recipe(tiny_corpus, 1, 1, 2), 4))
    assert_same(run(in_pipeline(config, 2, schedule, **keys)), run(on_one_rank(config)))


@pytest.mark.slow
def test_the_indexers_warm_up_in_a_pipeline(tiny_corpus: Path) -> None:
    """As in V3.2: all else frozen, at a rate of its own, then everything learns."""
    config = with_layers(sparse_recipe(tiny_corpus, 1, 1, 2), 3)
    stages = (
        StageConfig(steps=1, learning_rate=1e-3, indexer_stage="dense_warmup"),
        StageConfig(learning_rate=1e-4, indexer_stage="sparse"),
    )
    config = replace(config, train=replace(config.train, steps=2, stages=stages))
    found = run(in_pipeline(config, 2, pipeline_layers=(2, 1)))
    assert_same(found, run(on_one_rank(config)))
    assert all("dsa/indexer_kl" in record for record in found)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", more("zbv")])
def test_muon_and_longer_sequences_from_the_warm_up_on(
    tiny_corpus: Path, schedule: PipelineSchedule
) -> None:
    """As in V4: dense, then a warm-up with longer sequences in smaller batches; beside data."""
    config = hybrid_recipe(tiny_corpus, 2, 1)
    compressed = replace(config.model.compressed, compress_ratios=(0, 4, 16, 4, 4))
    config = with_layers(config, 4, compressed=compressed)
    longer = {"sequence_length": 48, "global_batch_size": 4, "micro_batch_size": 1}
    stages = (
        StageConfig(steps=1, sequence_length=24, indexer_stage="dense"),
        StageConfig(steps=2, indexer_stage="dense_warmup", **longer),
        StageConfig(indexer_stage="sparse", **longer),
    )
    train = replace(config.train, steps=5, stages=stages, micro_batch_size=2)
    data = replace(config.data, num_lanes=4)
    config = replace(config, train=train, optim=MUON, data=data)
    assert_same(run(in_pipeline(config, 2, schedule)), run(on_one_rank(config)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "schedule", "ratios", "keys"),
    [
        # Stages without an indexer learn nothing while all else is frozen.
        (2, "1f1b", (0, 0, 4, 16, 4), {}),
        (4, "1f1b", (0, 0, 4, 16, 0), {}),
        more(2, "zbv", (0, 0, 4, 16, 4), WITH_CONTEXT_2),
        (2, "dualpipev", (4, 16, 0, 4, 4), WITH_TENSOR_2),
    ],
)
def test_hybrid_attention_with_indexers_in_some_stages(
    tiny_corpus: Path,
    ranks: int,
    schedule: PipelineSchedule,
    ratios: tuple[int, ...],
    keys: dict[str, Any],
) -> None:
    config = through_its_stages(hybrid_recipe(tiny_corpus, 1, 2))
    compressed = replace(config.model.compressed, compress_ratios=ratios)
    config = with_layers(config, 4, compressed=compressed)
    found = run(in_pipeline(config, ranks, schedule, **keys))
    assert_same(found, run(on_one_rank(config)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "data", "keys"),
    [("1f1b", 2, {}), ("interleaved_1f1b", 1, WITH_TENSOR_2), ("zbv", 1, WITH_CONTEXT_2)],
)
def test_images_enter_at_the_first_stage(
    tiny_corpus: Path, schedule: PipelineSchedule, data: int, keys: dict[str, Any]
) -> None:
    config = with_layers(test_image_layouts.recipe(tiny_corpus, data, 1), 4)
    found = run(in_pipeline(config, 2, schedule, **keys), train_on_images)
    assert_same(found, run(on_one_rank(config), train_on_images))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_batches_may_change_their_shape(tiny_corpus: Path, schedule: PipelineSchedule) -> None:
    """A ramp, then longer sequences; the held-out split is no whole number of microbatches."""
    config = stack(tiny_corpus, "mhc")
    train = replace(
        config.train,
        steps=6,
        batch_size_ramp=BatchSizeRampConfig(start=4, increment=4, samples=8),
        stages=(
            StageConfig(steps=3, sequence_length=24, micro_batch_size=1),
            StageConfig(sequence_length=40),
        ),
    )
    config = replace(
        config,
        train=train,
        data=replace(config.data, num_lanes=4),
        evaluate=replace(config.evaluate, num_sequences=5),
    )
    assert_same(run(in_pipeline(config, 2, schedule)), run(on_one_rank(config)))


def lose_gradients(rank: int, config: RunConfig) -> str:
    with (
        patch("train.build.problems", return_value=[]),
        pytest.raises(RuntimeError, match="no gradient after backward") as error,
    ):
        train_rank(rank, config)
    return str(error.value)


@pytest.mark.slow
def test_gradients_that_torch_loses_are_missed_at_once(tiny_corpus: Path) -> None:
    """Past the rule: without the gathered parameters a split backward pass forgets some of them."""
    config = in_pipeline(stack(tiny_corpus, "mhc"), 2, "zbv", reshard_after_forward=True)
    found = run_distributed(lose_gradients, 2, config, timeout=200.0)
    assert any("layers." in message for message in found)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "dualpipev"])
def test_bf16_is_bitwise_that_of_one_rank(tiny_corpus: Path, schedule: PipelineSchedule) -> None:
    """Gradients add up in fp32 and in the order of the microbatches, also those computed apart."""
    config = stack(tiny_corpus, "mhc")
    config = replace(config, train=replace(config.train, dtype="bf16", micro_batch_size=1))
    wanted = run(replace(config, parallel=ParallelConfig()))
    for ours, theirs in zip(run(in_pipeline(config, 2, schedule)), wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-7)
        for key in TENSORS:
            for name, value in theirs[key].items():
                assert np.array_equal(ours[key][name], value), (key, name)
