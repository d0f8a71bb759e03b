"""Save what a test trains, as the loop would; and train as a rank does, in a forked process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.backend.cpu import CpuBackend
from parallel.config import EngramTableConfig, ParallelConfig
from tests.parity.test_layouts import recipe
from train.checkpoint.saver import CheckpointSaver
from train.checkpoint.state import Progress
from train.config import CheckpointConfig, EvaluateConfig, MonitorConfig, RunConfig
from train.loop import train
from train.stop import StopRequest
from train.training import Training

DETERMINED = ("step", "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")
"""In the records of a run: what does not depend on time."""


def save(training: Training, run_dir: Path, progress: Progress, *, corpus: str = "") -> None:
    """Save and wait; all ranks call it."""
    with CheckpointSaver(training, run_dir, corpus=corpus) as saver:
        saver.save(progress)


def small_run(
    corpus: Path, checkpoint: CheckpointConfig, *, steps: int, layers: int = 1, **parallel: Any
) -> RunConfig:
    """Experts, mHC, and memories in host memory, in fp64; a batch is 8 sequences.

    One layer, without more, starts quickly; several have a dense one and MTP beside.
    """
    config = recipe(corpus, "mhc", 1, 1, 2)
    model, ranks = replace(config.model, num_layers=layers), parallel.get("data_parallel_size", 1)
    if layers == 1:
        assert model.engram is not None
        memory = replace(model.engram, layers=(0,))
        model = replace(model, num_dense_layers=0, mtp_depth=0, engram=memory)
    ranks *= parallel.get("data_replicate_parallel_size", 1)
    return replace(
        config,
        model=model,
        parallel=ParallelConfig(engram=EngramTableConfig(storage="memory"), **parallel),
        data=replace(config.data, sequence_length=24),
        optim=replace(config.optim, schedule="constant"),
        train=replace(config.train, steps=steps, micro_batch_size=min(2, 8 // ranks)),
        checkpoint=checkpoint,
        evaluate=EvaluateConfig(every_steps=0),
        monitor=MonitorConfig(tensorboard=False, wandb=False, residual_every_steps=0),
    )


def train_here(rank: int, config: RunConfig, run_dir: Path) -> int:
    """What `train.run` does, in a process that the harness has forked; returns the exit code."""
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    stop = StopRequest()
    stop.install()
    return train(config, run_dir, stop)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The determined part of every record of a run."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [{name: row[name] for name in DETERMINED if name in row} for row in rows]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, oldest first."""
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := json.loads(line))["event"] == kind]
