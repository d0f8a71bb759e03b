"""Checkpoints of pipelines: whatever the placement of the stages, the same files' worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data.loader import fingerprint
from launch.checkpoint import import_hf
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.layout import ParallelLayout
from parallel.pipeline_stages import SPLIT_BACKWARD
from tests.checkpoints import save
from tests.distributed import test_huggingface
from tests.harness import run_distributed
from tests.parity.test_layouts import recipe
from tests.unit.train.checkpoint.runs import exported, read_folder, read_run, same
from train.build import build
from train.checkpoint.state import Progress
from train.config import RunConfig
from train.loop import open_batches, resume
from train.recipe import save_resolved
from train.step import train_step
from train.training import Training

STEP = 2


def on(corpus: Path, **parallel: Any) -> RunConfig:
    """Four layers with memory, MTP and balanced experts, in fp32."""
    config = recipe(corpus, "mhc", 1, 1, 2)
    micro = 2 // parallel.get("data_parallel_size", 1)
    return replace(
        config,
        model=replace(config.model, num_layers=4),
        parallel=ParallelConfig(**parallel),
        data=replace(config.data, sequence_length=24),
        train=replace(config.train, dtype="fp32", micro_batch_size=micro),
    )


def stages(schedule: PipelineSchedule, ranks: int = 2, **keys: Any) -> dict[str, Any]:
    return {
        "pipeline_parallel_size": ranks,
        "pipeline_schedule": schedule,
        "pipeline_stages_per_rank": 1 if schedule == "1f1b" else 2,
        "reshard_after_forward": schedule not in SPLIT_BACKWARD,
    } | keys


def join(config: RunConfig) -> Training:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return build(config)


def save_to(training: Training, run_dir: Path, progress: Progress) -> None:
    save(training, run_dir, progress, corpus=fingerprint(training.config.data))


def train_and_save(rank: int, config: RunConfig, run_dir: Path) -> float:
    """Save after two steps; the loss of the third."""
    training = join(config)
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    for step in range(1, STEP + 1):
        _, batch, data_state = next(batches)
        train_step(training, batch, step)
    save_to(training, run_dir, Progress(step=STEP, tokens=9, data_state=data_state))
    return train_step(training, next(batches)[1], STEP + 1)["loss"]


def load_and_save(rank: int, config: RunConfig, source: Path, target: Path) -> float:
    """Save what was loaded into a model with other weights; the loss of the step after it."""
    training = join(replace(config, train=replace(config.train, seed=1)))
    progress = resume(training, source, fingerprint(config.data))
    assert (progress.step, progress.tokens) == (STEP, 9)
    save_to(training, target, progress)
    # The order of the data depends on the seed, too.
    batch = next(open_batches(replace(training, config=config), progress))[1]
    return train_step(training, batch, STEP + 1)["loss"]


def spread(function: Any, config: RunConfig, *args: Any) -> float:
    """Run on the ranks of a layout, which agree on the loss."""
    world = ParallelLayout.from_config(config.parallel).world_size
    losses: list[float] = run_distributed(function, world, config, *args, timeout=200.0)
    assert len(set(losses)) == 1
    return losses[0]


def contents(run_dir: Path) -> dict[str, Any]:
    """Everything but random-number states, of which there are as many as ranks."""
    [checkpoint] = (run_dir / "checkpoints").iterdir()
    dcp_to_torch_save(str(checkpoint), str(run_dir / "whole.pt"))
    loaded: dict[str, Any] = torch.load(run_dir / "whole.pt", weights_only=False)
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    assert sum(key.startswith("rng.") for key in loaded) == meta["world_size"]
    return {key: value for key, value in loaded.items() if not key.startswith("rng.")}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        equal = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert equal, key


@pytest.fixture(scope="module")
def saved(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint of stages in a V, and the loss of the step after it."""
    run_dir = tmp_path_factory.mktemp("runs") / "v"
    return run_dir, spread(train_and_save, on(tiny_corpus, **stages("zbv")), run_dir)


@pytest.fixture(scope="module")
def resaved(tiny_corpus: Path, saved: tuple[Path, float]) -> Path:
    """The same checkpoint, loaded and saved by one rank."""
    run_dir = saved[0].with_name("one_rank")
    loss = spread(load_and_save, on(tiny_corpus), saved[0], run_dir)
    assert loss == pytest.approx(saved[1], rel=1e-6)
    return run_dir


def test_one_rank_loads_what_a_pipeline_saved(saved: tuple[Path, float], resaved: Path) -> None:
    wanted = contents(saved[0])
    states = {key.split(".")[1] for key in wanted if key.startswith("optim.")}
    assert states == {"exp_avg", "exp_avg_sq", "step"}
    assert any(wanted[key].any() for key in wanted if key.endswith("expert_bias"))
    assert_same(contents(resaved), wanted)


@pytest.mark.parametrize(
    "parallel",
    [
        stages("1f1b", pipeline_layers=(3, 1)),
        *(
            pytest.param(parallel, marks=pytest.mark.slow)
            for parallel in (
                stages("zbv"),
                stages("dualpipev"),
                stages("1f1b", ranks=4),
                stages("looped_bfs"),
                stages("interleaved_zero_bubble"),
                stages("interleaved_1f1b", data_parallel_size=2),
                stages("1f1b", data_parallel_size=2, expert_parallel_size=2),
                {"data_parallel_size": 2, "expert_parallel_size": 2},
            )
        ),
    ],
)
def test_any_layout_loads_what_one_rank_saved(
    tiny_corpus: Path,
    tmp_path: Path,
    saved: tuple[Path, float],
    resaved: Path,
    parallel: dict[str, Any],
) -> None:
    loss = spread(load_and_save, on(tiny_corpus, **parallel), resaved, tmp_path)
    assert loss == pytest.approx(saved[1], rel=1e-6)
    assert_same(contents(tmp_path), contents(resaved))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_pipelined_run_goes_out_comes_back_and_trains_on(
    tiny_corpus: Path, tmp_path: Path, schedule: PipelineSchedule
) -> None:
    config, run = test_huggingface.recipe(tiny_corpus), tmp_path / "run"
    run.mkdir()
    parallel = ParallelConfig(**stages(schedule))
    model = replace(config.model, num_layers=4)
    config = replace(
        config, model=model, parallel=parallel, train=replace(config.train, micro_batch_size=1)
    )
    save_resolved(config, run / "recipe.yaml")
    assert run_distributed(test_huggingface.train_rank, 2, run) == [0, 0]
    folder = exported(run, tmp_path / "folder")

    again = tmp_path / "again"
    assert import_hf(folder, again, recipe=str(run / "recipe.yaml"), overrides=[]) == 0
    assert same(read_run(again), read_run(run))
    assert run_distributed(test_huggingface.train_rank, 2, again) == [0, 0]
    trained = exported(again, tmp_path / "trained")
    assert read_folder(trained).keys() == read_folder(folder).keys()
    assert not same(read_folder(trained), read_folder(folder))
