"""Kill, stop and resume real runs through the command line, and compare every number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from parallel.engram_reader import open_tables
from tests.distributed.launching import ranks_of

STEPS = 9
TRAIN = [
    *("train.global_batch_size=4", "train.micro_batch_size=1", "data.sequence_length=64"),
    *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2"),
    *(f"train.steps={STEPS}", "checkpoint.every_steps=3", "checkpoint.keep_last=9"),
    *("evaluate.every_steps=4", "evaluate.num_sequences=2", "optim.warmup_steps=3"),
    *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512", "monitor.wandb=false"),
    "launch.max_restarts_without_progress=0",
]
DETERMINED = ("step", "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")


def mneme(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def determined(run_dir: Path) -> list[dict[str, Any]]:
    names = (*DETERMINED, "validation/loss")
    return [{k: row[k] for k in names if k in row} for row in records(run_dir)]


def wait_for_step(run_dir: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or len(records(run_dir)) < step:
        assert time.monotonic() < deadline, "the run never got there"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def tensors(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    dcp_to_torch_save(str(checkpoint), str(scratch))
    loaded: dict[str, Any] = torch.load(scratch, weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def recipe(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        "defaults: [v4_nano]\n"
        "data:\n"
        f"  tokenizer: {tiny_corpus}/tokenizer.json\n"
        "  sources:\n"
        f"    code: {{path: {tiny_corpus}/code}}\n"
        f"    docs: {{path: {tiny_corpus}/docs}}\n"
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    finish(mneme("train", str(recipe), *TRAIN, "--run-dir", str(run_dir)), 0)
    assert [row["step"] for row in records(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def assert_same_run(run_dir: Path, reference: Path, scratch: Path) -> None:
    assert determined(run_dir) == determined(reference)
    name = f"checkpoints/step-{STEPS:08d}"
    ours = tensors(run_dir / name, scratch / "ours.pt")
    theirs = tensors(reference / name, scratch / "theirs.pt")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value
        assert same, key


@pytest.mark.slow
@pytest.mark.parametrize("kill_after_step", [1, 5])
def test_kill_9_of_all_ranks_then_resume_is_bitwise_the_same_run(
    recipe: Path, uninterrupted: Path, tmp_path: Path, kill_after_step: int
) -> None:
    run_dir = tmp_path / "killed"
    process = mneme("train", str(recipe), *TRAIN, "--run-dir", str(run_dir))
    wait_for_step(run_dir, kill_after_step, process)
    for rank in ranks_of(run_dir):
        rank.kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode not in (0, 2, 85)
    assert "SIGKILL" in output
    finish(mneme("resume", str(run_dir)), 0)
    assert_same_run(run_dir, uninterrupted, tmp_path)


@pytest.mark.slow
def test_sigterm_saves_one_step_on_all_ranks_and_resume_is_bitwise_the_same_run(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "stopped"
    process = mneme("train", str(recipe), *TRAIN, "--run-dir", str(run_dir))
    wait_for_step(run_dir, 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 85)
    assert ranks_of(run_dir) == []
    status = json.loads((run_dir / "status.json").read_text())
    last = records(run_dir)[-1]["step"]
    assert status["state"] == "stopped"
    assert (run_dir / f"checkpoints/step-{last:08d}/checkpoint.json").exists()
    assert last < STEPS
    finish(mneme("resume", str(run_dir)), 0)
    assert_same_run(run_dir, uninterrupted, tmp_path)


@pytest.mark.slow
def test_torchs_own_launcher_runs_the_same_ranks(uninterrupted: Path, tmp_path: Path) -> None:
    """A cluster that starts ranks with torchrun gets the same run."""
    run_dir = tmp_path / "torchrun"
    run_dir.mkdir()
    shutil.copy(uninterrupted / "recipe.yaml", run_dir / "recipe.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*torchrun, "-m", "train.run", str(run_dir)], check=True, timeout=200, env=environment
    )
    assert_same_run(run_dir, uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tables_in_host_memory_survive_kill_9_bitwise_too(recipe: Path, tmp_path: Path) -> None:
    """Saved in every step, with a new base after every few, and killed again and again."""
    host = [*TRAIN, "parallel.engram.storage=memory", "checkpoint.every_steps=1", "train.steps=24"]
    reference, run_dir = tmp_path / "whole", tmp_path / "killed"
    finish(mneme("train", str(recipe), *host, "--run-dir", str(reference)), 0)
    process = mneme("train", str(recipe), *host, "--run-dir", str(run_dir))
    for step in (2, 9, 17):
        wait_for_step(run_dir, step, process)
        for rank in ranks_of(run_dir):
            rank.kill()
        process.communicate(timeout=200)
        process = mneme("resume", str(run_dir))
    finish(process, 0)
    assert determined(run_dir) == determined(reference)
    name = "checkpoints/step-00000024"
    assert [path for path in (run_dir / name / "engram").iterdir() if path.name.startswith("base")]
    ours, theirs = open_tables(run_dir / name), open_tables(reference / name)
    assert ours.layers == theirs.layers
    for layer, num_rows in ours.layers.items():
        rows = ours.rows(layer, np.arange(num_rows))
        assert rows.any()
        assert np.array_equal(rows, theirs.rows(layer, np.arange(num_rows)))
