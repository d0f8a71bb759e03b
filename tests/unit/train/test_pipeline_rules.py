from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline_stages import SPLIT_BACKWARD
from train.build import build
from train.config import BatchSizeRampConfig, RunConfig, StageConfig, TrainConfig
from train.model.config import ModelConfig
from train.pipeline_rules import problems


def recipe(
    schedule: PipelineSchedule = "1f1b",
    ranks: int = 2,
    parallel: dict[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    keys = {
        "pipeline_stages_per_rank": 1 if schedule == "1f1b" else 2,
        "reshard_after_forward": schedule not in SPLIT_BACKWARD,
    } | (parallel or {})
    sizes = {"steps": 8, "global_batch_size": 8, "micro_batch_size": 1} | train
    return RunConfig(
        name="pipeline",
        model=ModelConfig(num_layers=8),
        parallel=ParallelConfig(pipeline_parallel_size=ranks, pipeline_schedule=schedule, **keys),
        train=TrainConfig(**sizes),
    )


RAMP = BatchSizeRampConfig(start=2, increment=2, samples=12)


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (recipe(), []),
        (recipe("dualpipev", ranks=1), []),  # no pipeline, no rules
        (
            recipe(ranks=4, micro_batch_size=4),
            [
                "train.global_batch_size=8: a batch of 8 is 2 x 4 sequences (microbatches x their "
                "size) on each of parallel.data_parallel_size*data_replicate=1 ranks, and parallel.pipeline_schedule=1f1b needs one for each of 4 stages; use "
                "train.micro_batch_size=1 or 2, or train.global_batch_size=16"
            ],
        ),
        (
            recipe("dualpipev", parallel={"data_parallel_size": 4}, micro_batch_size=2),
            [
                "train.global_batch_size=8: a batch of 8 is 1 x 2 sequences (microbatches x their "
                "size) on each of parallel.data_parallel_size*data_replicate=4 ranks, and parallel.pipeline_schedule=dualpipev needs one for each of 4 stages; use "
                "train.global_batch_size=32"
            ],
        ),
        (
            recipe("interleaved_1f1b", global_batch_size=7),
            [
                "train.global_batch_size=7: a batch of 7 is 7 x 1 sequences (microbatches x their "
                "size) on each of parallel.data_parallel_size*data_replicate=1 ranks, and parallel.pipeline_schedule=interleaved_1f1b orders them in 3 equal rounds "
                "of parallel.pipeline_parallel_size=2 or more; use train.micro_batch_size=7, or "
                "train.global_batch_size=6 or 8"
            ],
        ),
        (
            recipe(ranks=4, batch_size_ramp=RAMP),
            [
                "train.batch_size_ramp.start=2: a batch of 2 is 2 x 1 sequences (microbatches x their "
                "size) on each of parallel.data_parallel_size*data_replicate=1 ranks, and parallel.pipeline_schedule=1f1b needs one for each of 4 stages; use a ramp "
                "over batches such as 4"
            ],
        ),
        (
            recipe(stages=(StageConfig(steps=4), StageConfig(global_batch_size=1))),
            [
                "train.stages[1].global_batch_size=1: a batch of 1 is 1 x 1 sequences (microbatches x their "
                "size) on each of parallel.data_parallel_size*data_replicate=1 ranks, and parallel.pipeline_schedule=1f1b needs one for each of 2 stages; use "
                "train.stages[1].global_batch_size=2"
            ],
        ),
        (
            recipe("zbv", recompute="full"),
            [
                "train.recompute=full: parallel.pipeline_schedule=zbv goes back through a layer for "
                "its inputs and again for each of its weights, and would compute it anew each time; "
                "use train.recompute=none, or parallel.pipeline_schedule=interleaved_1f1b"
            ],
        ),
        (recipe("interleaved_1f1b", recompute="full"), []),
    ],
)
def test_problems_say_what_to_type(config: RunConfig, lines: list[str]) -> None:
    assert list(problems(config)) == lines


def test_what_is_suggested_works() -> None:
    assert not list(problems(recipe(ranks=4, micro_batch_size=2)))
    assert not list(problems(recipe(ranks=4, micro_batch_size=4, global_batch_size=16)))
    assert not list(problems(recipe("interleaved_1f1b", global_batch_size=7, micro_batch_size=7)))
    assert not list(problems(recipe(ranks=4, batch_size_ramp=replace(RAMP, start=4))))


def test_ranks_refuse_a_wrong_pipeline_before_they_meet(
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All problems at once, on each rank alone: there is no process group here."""
    data = DataConfig(
        sources={"code": SourceConfig(path=str(tiny_corpus / "code"))},
        tokenizer=str(tiny_corpus / "tokenizer.json"),
    )
    wrong = {"pipeline_layers": (8,), "reshard_after_forward": True}
    config = replace(recipe("zbv", parallel=wrong, recompute="full"), data=data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match="pipeline_layers") as error:
            build(config)
        found.append(str(error.value).splitlines())
    assert found[0] == found[1]
    assert [line.partition("=")[0] for line in found[0]] == [
        "parallel.pipeline_layers",
        "parallel.reshard_after_forward",
        "train.recompute",
    ]
