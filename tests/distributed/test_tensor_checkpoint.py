"""Checkpoints between layouts that cut weights and layouts that do not: every number, bitwise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from tests.checkpoints import save
from tests.harness import run_distributed
from tests.parity.test_layouts import recipe, whole
from train.build import build
from train.checkpoint.state import Progress, restore
from train.config import RunConfig
from train.step import train_step
from train.training import Training

ONE = ParallelConfig()
CUT = ParallelConfig(data_parallel_size=2, tensor_parallel_size=2, expert_parallel_size=2)
OTHERS = [
    ONE,
    ParallelConfig(data_parallel_size=4),
    ParallelConfig(tensor_parallel_size=4, expert_parallel_size=4),
]


def config_of(corpus: Path, parallel: ParallelConfig) -> RunConfig:
    return replace(recipe(corpus, "mhc", 1, 1, 2), parallel=parallel)


def ranks_of(parallel: ParallelConfig) -> int:
    return parallel.data_parallel_size * parallel.tensor_parallel_size


def step_of(training: Training, number: int) -> float:
    batches = build_loader(
        training.config.data,
        split="train",
        seed=number,
        global_batch_size=8,
        data_rank=training.data_rank,
        data_size=training.data_size,
    )
    return train_step(training, next(batches)[0], number)["loss"]


def numbers(training: Training) -> dict[str, NDArray[Any]]:
    """Parameters, buffers, and the optimizer's states."""
    found = {name: whole(value) for name, value in training.model.state_dict().items()}
    for name, value in training.engine.state().items():
        if name.startswith("optim."):
            found[name] = whole(value)
    return found


def save_rank(rank: int, config: RunConfig, run_dir: Path) -> tuple[dict[str, Any], float]:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    step_of(training, 1)
    lanes = {f"lane/{training.data_rank}": f"position {training.data_rank}"}
    save(training, run_dir, Progress(step=1, tokens=0, data_state=lanes))
    saved = numbers(training)
    return saved, step_of(training, 2)


def load_rank(rank: int, config: RunConfig, run_dir: Path) -> tuple[dict[str, Any], float]:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    progress = restore(
        run_dir,
        training.model,
        training.engine,
        ["lane/0"],
        rng_state=training.backend.rng_state(),
        tables=training.tables,
        corpus="",
    )
    assert progress is not None
    assert progress.data_state == {"lane/0": "position 0"}
    loaded = numbers(training)
    return loaded, step_of(training, 2)


def move(corpus: Path, run_dir: Path, source: ParallelConfig, *targets: ParallelConfig) -> None:
    saved, next_loss = run_distributed(
        save_rank, ranks_of(source), config_of(corpus, source), run_dir, timeout=300.0
    )[0]
    for target in targets:
        found = run_distributed(
            load_rank, ranks_of(target), config_of(corpus, target), run_dir, timeout=300.0
        )
        for loaded, loss in found:
            assert loss == pytest.approx(next_loss, rel=1e-12)
            assert loaded.keys() == saved.keys()
            for name, value in saved.items():
                assert np.array_equal(loaded[name], value), (target, name)


@pytest.mark.slow
def test_a_checkpoint_of_cut_weights_is_read_whole_and_back(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    move(tiny_corpus, tmp_path / "cut", CUT, ONE)
    move(tiny_corpus, tmp_path / "whole", ONE, CUT)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cut_weights_move_to_every_layout(tiny_corpus: Path, tmp_path: Path) -> None:
    move(tiny_corpus, tmp_path, CUT, CUT, *OTHERS)
