from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import BatchSizeRampConfig, RunConfig, StageConfig, TrainConfig
from train.model.attention.config import CompressedConfig
from train.model.config import ModelConfig
from train.stages import Phase, phases, problems, ramp_steps


def recipe(**train: Any) -> RunConfig:
    return RunConfig(name="stages", train=TrainConfig(**{"global_batch_size": 16} | train))


def shapes(config: RunConfig) -> list[tuple[int, int, int, int, int]]:
    return [
        (p.stage, p.first_step, p.last_step, p.sequence_length, p.global_batch_size)
        for p in phases(config)
    ]


def batch_sizes(found: list[Phase]) -> list[int]:
    return [p.global_batch_size for p in found for _ in range(p.first_step, p.last_step + 1)]


def test_a_plain_run_is_one_phase() -> None:
    assert shapes(recipe(steps=7)) == [(0, 1, 7, 256, 16)]


def test_stages_follow_each_other_and_the_last_takes_what_is_left() -> None:
    stages = (
        StageConfig(steps=3, sequence_length=64),
        StageConfig(steps=2, sequence_length=128, global_batch_size=8, micro_batch_size=1),
        StageConfig(learning_rate=0.5),
    )
    config = recipe(steps=9, stages=stages)
    assert shapes(config) == [(0, 1, 3, 64, 16), (1, 4, 5, 128, 8), (2, 6, 9, 256, 16)]
    assert [p.micro_batch_size for p in phases(config)] == [4, 1, 4]
    assert [p.learning_rate for p in phases(config)] == [None, None, 0.5]
    assert [p.tokens_per_step for p in phases(config)] == [1024, 1024, 4096]
    assert list(problems(config)) == []


def test_the_ramp_belongs_to_the_first_stage() -> None:
    ramp = BatchSizeRampConfig(start=4, increment=4, samples=24)
    stages = (StageConfig(steps=10), StageConfig(sequence_length=512, global_batch_size=8))
    config = recipe(steps=12, stages=stages, batch_size_ramp=ramp)
    assert batch_sizes(phases(config)) == [4, 4, 8, 12, *[16] * 6, 8, 8]
    assert list(problems(config)) == []


def test_the_stage_of_the_indexer_is_the_models_where_a_stage_says_none() -> None:
    stages = (StageConfig(steps=2, indexer_stage="dense"), StageConfig())
    for model, wrong in ((ModelConfig(attention="dsa"), 0), (ModelConfig(), 1)):
        config = replace(recipe(steps=3, stages=stages), model=model)
        assert [phase.indexer_stage for phase in phases(config)] == ["dense", "sparse"]
        assert len(list(problems(config))) == wrong
    assert phases(recipe())[0].indexer_stage is None


def test_only_hybrids_with_csa_layers_have_an_indexer() -> None:
    compressed = CompressedConfig(compress_ratios=(0, 16, 16, 16, 4), csa_ratio=4, hca_ratio=16)
    hybrid = ModelConfig(attention="v4_hybrid", num_layers=4, compressed=compressed)
    assert hybrid.num_indexers == 0
    assert replace(hybrid, mtp_depth=1).num_indexers == 1


def test_a_run_may_end_within_its_ramp() -> None:
    ramp = BatchSizeRampConfig(start=4, increment=4, samples=1000)
    assert batch_sizes(phases(recipe(steps=5, batch_size_ramp=ramp))) == [4] * 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@settings(deadline=None)
@given(
    start=st.integers(1, 20),
    increment=st.integers(1, 9),
    increments=st.integers(1, 6),
    # An interval that is a whole number of samples: megatron's floating point is exact there.
    interval=st.integers(1, 60),
    steps=st.integers(1, 60),
)
def test_the_ramp_equals_megatron_core(
    start: int, increment: int, increments: int, interval: int, steps: int
) -> None:
    from megatron.core import num_microbatches_calculator as calculators  # noqa: PLC0415

    full, samples = start + increment * increments, interval * increments
    calculator = calculators.RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 1, start, increment, samples
    )
    expected, consumed = [], 0
    for _ in range(steps):
        calculator.update(consumed, consistency_check=True)
        expected.append(calculator.get_current_global_batch_size())
        consumed += expected[-1]
    ramp = BatchSizeRampConfig(start=start, increment=increment, samples=samples)
    found = recipe(steps=steps, global_batch_size=full, batch_size_ramp=ramp)
    assert batch_sizes(phases(found)) == expected


@given(st.integers(1, 10**12), st.integers(1, 10**6), st.integers(1, 999))
def test_the_ramp_is_exact_for_any_number_of_samples(
    samples: int, start: int, increments: int
) -> None:
    ramp = BatchSizeRampConfig(start=start, increment=7, samples=samples)
    consumed = 0
    for size, steps in ramp_steps(ramp, start + 7 * increments):
        for c in (consumed, consumed + (steps - 1) * size):
            assert size == start + c * increments // samples * 7
        consumed += steps * size
    assert consumed >= samples


@pytest.mark.parametrize(
    ("train", "start", "fix"),
    [
        (
            {"stages": (StageConfig(indexer_stage="dense"),)},
            "train.stages[0].indexer_stage=dense: model.attention=mla has no indexer",
            "use null, or model.attention=dsa",
        ),
        (
            {"stages": (StageConfig(), StageConfig(steps=50))},
            "train.stages[0].steps=null: only the last stage",
            "use a number",
        ),
        (
            {"stages": (StageConfig(steps=60), StageConfig(steps=50))},
            "train.steps=100: train.stages take 110 steps",
            "use train.steps=110, or steps: null in the last stage",
        ),
        (
            {"stages": (StageConfig(steps=100), StageConfig())},
            "train.steps=100: train.stages take 100 steps before the last",
            "use train.steps=101 or more",
        ),
        (
            {"batch_size_ramp": BatchSizeRampConfig(start=3, increment=5, samples=10)},
            "train.batch_size_ramp.start=3: steps of increment=5 must lead to the full batch of 16",
            "use start=1",
        ),
        (
            {"batch_size_ramp": BatchSizeRampConfig(start=20, increment=4, samples=10)},
            "train.batch_size_ramp.start=20: ",
            "use start=4",
        ),
        (
            {
                "batch_size_ramp": BatchSizeRampConfig(start=4, increment=4, samples=24),
                "stages": (StageConfig(steps=3), StageConfig()),
            },
            "train.batch_size_ramp.samples=24: the ramp takes 4 steps, the first stage 3",
            "use fewer samples or train.stages[0].steps=4",
        ),
    ],
)
def test_a_broken_rule(train: dict[str, Any], start: str, fix: str) -> None:
    found = list(problems(recipe(**train)))
    assert found[0].startswith(start)
    assert fix in found[0]


def test_fixes_of_the_ramp_work() -> None:
    config = recipe(batch_size_ramp=BatchSizeRampConfig(start=1, increment=5, samples=10))
    assert list(problems(config)) == []
    config = replace(config, train=replace(config.train, global_batch_size=1))
    assert list(problems(config)) == []
