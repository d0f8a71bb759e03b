"""`mneme train` and `mneme resume` on the device."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_resume import DETERMINED, tensors
from tests.gpu.conftest import BACKEND
from tests.gpu.worker import Worker

pytestmark = pytest.mark.gpu

STEPS = 40
TRAIN = [
    *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
    *("train.global_batch_size=8", "train.micro_batch_size=4", "data.sequence_length=256"),
    *(f"train.steps={STEPS}", "checkpoint.every_steps=20", "checkpoint.keep_last=9"),
    *("evaluate.every_steps=20", "evaluate.num_sequences=4", "optim.warmup_steps=5"),
    *("model.vocab_size=512", "monitor.wandb=false", "monitor.tensorboard=false"),
]


def mneme(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MNEME_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Without the first steps, which compile and warm up."""
    return statistics.mean(float(row[name]) for row in rows[5:])


@pytest.mark.timeout(220)
def test_the_loss_falls_and_a_resumed_run_is_bitwise_the_same(
    device: Worker, tiny_corpus: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    device.close()  # gives the device to the run
    recipe = tmp_path / "tiny.yaml"
    sources = "".join(f"    {name}: {{path: {tiny_corpus}/{name}}}\n" for name in ("code", "docs"))
    recipe.write_text(
        f"defaults: [v4_nano]\ndata:\n  tokenizer: {tiny_corpus}/tokenizer.json\n"
        f"  sources:\n{sources}"
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    backend = (f"parallel.backend={BACKEND}", "train.dtype=bf16")
    mneme("train", str(recipe), *TRAIN, *backend, "--run-dir", str(whole))
    rows = records(whole)
    losses = [row["loss"] for row in rows]
    seconds = sorted(row["step_seconds"] for row in rows)[STEPS // 2]
    figure(
        f"mneme train v4_nano bf16: loss {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"{1e3 * seconds:.0f} ms a step, {rows[-1]['peak_memory_bytes'] >> 20} MiB; rows of host "
        f"tables fetched in {1e3 * mean(rows, 'engram/fetch_seconds'):.1f} ms, of which "
        f"{mean(rows, 'engram/prefetch_hidden_fraction'):.0%} hidden"
    )
    assert losses[-1] < losses[0] - 1.0
    assert "validation/loss" in rows[-1]

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / f"checkpoints/step-{STEPS:08d}")
    mneme("resume", str(resumed))
    assert [{key: row.get(key) for key in DETERMINED} for row in records(resumed)] == [
        {key: row.get(key) for key in DETERMINED} for row in rows
    ]
    name = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = (tensors(run / name, tmp_path / "flat.pt") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value
        assert same, key
