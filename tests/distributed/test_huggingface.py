"""A run with every kind of cut to a Hugging Face folder, and such a run from one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.config import DataConfig, SourceConfig
from data.loader import fingerprint
from launch.checkpoint import import_hf
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from tests.harness import run_distributed
from tests.unit.train.checkpoint.runs import exported, noisy, read_folder, read_run, same, write_run
from tests.unit.train.model.tiny import TINY
from train.build import build
from train.checkpoint.commit import newest_checkpoint
from train.checkpoint.huggingface.stored import stored_tensors
from train.config import (
    CheckpointConfig,
    EvaluateConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from train.loop import resume, train
from train.recipe import load_resolved, save_resolved
from train.stop import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def recipe(corpus: Path) -> RunConfig:
    return RunConfig(
        name="sharded",
        model=replace(TINY, vocab_size=512, residual="plain", swiglu_limit=None, mtp_depth=1),
        parallel=ParallelConfig(tensor_parallel_size=2, expert_parallel_size=2),
        data=DataConfig(
            sources={"code": SourceConfig(path=str(corpus / "code"))},
            tokenizer=str(corpus / "tokenizer.json"),
            sequence_length=32,
        ),
        optim=OptimConfig(warmup_steps=0, eps=1e-8),
        train=TrainConfig(steps=2, global_batch_size=4, micro_batch_size=2),
        checkpoint=CheckpointConfig(every_steps=1),
        evaluate=EvaluateConfig(every_steps=0),
        monitor=MonitorConfig(tensorboard=False, wandb=False),
    )


def whole(value: Tensor) -> NDArray[Any]:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().numpy().copy()


def train_rank(rank: int, run_dir: Path) -> int:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return train(load_resolved(run_dir / "recipe.yaml"), run_dir, StopRequest())


def restore_rank(rank: int, run_dir: Path) -> dict[str, Any]:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    config = load_resolved(run_dir / "recipe.yaml")
    training = build(config)
    progress = resume(training, run_dir, fingerprint(config.data))
    assert progress is not None
    return {
        "step": progress.step,
        "states_are_zero": not any(
            whole(value).any()
            for name, value in training.engine.state().items()
            if name.startswith("optim.")
        ),
        "tensors": {name: whole(value) for name, value in training.model.state_dict().items()},
    }


@pytest.mark.slow
def test_a_sharded_run_goes_out_comes_back_and_trains_on(tiny_corpus: Path, tmp_path: Path) -> None:
    config, run = recipe(tiny_corpus), tmp_path / "run"
    run.mkdir()
    save_resolved(config, run / "recipe.yaml")
    assert run_distributed(train_rank, 2, run) == [0, 0]
    folder = exported(run, tmp_path / "folder")

    again = tmp_path / "again"
    assert import_hf(folder, again, recipe=str(run / "recipe.yaml"), overrides=[]) == 0
    assert load_resolved(again / "recipe.yaml") == config
    assert same(read_run(again), read_run(run))
    found = run_distributed(restore_rank, 2, again)
    wanted = read_run(run)
    for answer in found:
        assert (answer["step"], answer["states_are_zero"]) == (0, True)
        for name, (key, _) in stored_tensors(config.model).items():
            assert np.array_equal(answer["tensors"][name], wanted[key].numpy()), name

    assert run_distributed(train_rank, 2, again) == [0, 0]
    newest = newest_checkpoint(again)
    assert newest is not None
    assert newest[0] == 2
    trained = exported(newest[1], tmp_path / "trained")
    assert read_folder(trained).keys() == read_folder(folder).keys()
    assert not same(read_folder(trained), read_folder(folder))


def test_bf16_weights_become_fp32_when_they_are_trained(tiny_corpus: Path, tmp_path: Path) -> None:
    config = replace(recipe(tiny_corpus), parallel=ParallelConfig())
    run = write_run(tmp_path / "run", noisy(config.model))
    folder = exported(run, tmp_path / "folder", dtype="bf16")
    save_resolved(config, tmp_path / "recipe.yaml")
    again = tmp_path / "again"
    assert import_hf(folder, again, recipe=str(tmp_path / "recipe.yaml"), overrides=[]) == 0
    stored = read_run(again)
    [found] = run_distributed(restore_rank, 1, again)
    for name, (key, _) in stored_tensors(config.model).items():
        assert found["tensors"][name].dtype == np.float32
        assert np.array_equal(found["tensors"][name], stored[key].float().numpy()), name
