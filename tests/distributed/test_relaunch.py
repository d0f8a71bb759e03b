"""A run whose ranks crash is started again from its newest checkpoint, while that gets it on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import ROOT, Launcher


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def start(
        *, restarts: int = 3, module: str = "tests.distributed.toy_rank", **toy: Any
    ) -> Launcher:
        launcher = Launcher(tmp_path, toy, ranks=2, deadline=10.0, module=module, restarts=restarts)
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.communicate()


def restarts_of(launcher: Launcher) -> list[dict[str, Any]]:
    path = launcher.run_dir / "events.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, rows) if row["event"] == "restart"]


def attempts(launcher: Launcher) -> int:
    return len(list(launcher.run_dir.glob("logs/attempt-*")))


def test_a_rank_that_is_killed_starts_all_again_from_the_newest_checkpoint(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(save_every=3, crash_after_step=[1], crash_attempts=1, steps=40, gloo=True)
    code, output = launcher.finish()
    assert code == 0, output
    assert "rank 1 was killed by SIGKILL" in output
    assert "restart 1 of 3 without a new checkpoint, from the beginning, in 1 s" in output
    assert attempts(launcher) == 2
    [row] = restarts_of(launcher)
    assert (row["step"], row["rank"]) == (0, 1)
    assert row["detail"].startswith("rank 1 was killed by SIGKILL")
    assert launcher.status["state"] == "done"


@pytest.mark.slow
def test_the_budget_counts_restarts_in_a_row_without_a_new_checkpoint(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(restarts=1, crash=[0])
    code, output = launcher.finish()
    assert code == 1
    assert "gave up after 1 restart in a row without a new checkpoint" in output
    assert "the toy broke" in launcher.status["reason"]
    assert attempts(launcher) == 2
    assert [row["step"] for row in restarts_of(launcher)] == [0]


@pytest.mark.slow
def test_a_new_checkpoint_gives_the_whole_budget_back(launch: Callable[..., Launcher]) -> None:
    """Every attempt saves one step and is killed: twice, with a budget of one."""
    launcher = launch(restarts=1, save_every=1, crash_after_step=[0], crash_attempts=2, steps=3)
    code, output = launcher.finish()
    assert code == 0, output
    assert [row["step"] for row in restarts_of(launcher)] == [1, 2]
    assert output.count("restart 1 of 1 without a new checkpoint") == 2
    assert launcher.status["step"] == 3


def test_a_wrong_input_is_not_tried_again(launch: Callable[..., Launcher]) -> None:
    launcher = launch(wrong_input=[0, 1])
    code, output = launcher.finish()
    assert code == 2, output
    assert attempts(launcher) == 1
    assert restarts_of(launcher) == []
    assert launcher.status["state"] == "failed"


@pytest.mark.slow
def test_a_stop_request_while_waiting_to_start_again_ends_the_run(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(restarts=9, crash=[0])
    launcher.wait_for(lambda: len(restarts_of(launcher)) == 3)  # now it waits for 4 s
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert time.monotonic() - started < 3.0
    assert code == 85, output
    assert "stopped on SIGTERM before an attempt" in launcher.status["reason"]
    assert attempts(launcher) == 3
    assert launcher.alive() == []


NANO = [
    *("train.global_batch_size=4", "train.micro_batch_size=1", "data.sequence_length=32"),
    *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2", "train.steps=8"),
    *("checkpoint.every_steps=3", "evaluate.every_steps=0", "optim.warmup_steps=3"),
    *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512"),
    *("monitor.wandb=false", "monitor.tensorboard=false", "launch.threads_per_rank=1"),
]


def numbers(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().split("\n")[:-1])
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_with_a_killed_rank_is_bitwise_the_uninterrupted_one(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    data = [f"data.tokenizer={tiny_corpus}/tokenizer.json"]
    data += [f"data.sources.{name}.path={tiny_corpus}/{name}" for name in ("code", "docs")]

    def train(run_dir: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "launch.cli", "train", "v4_nano", *NANO, *data]
        return subprocess.Popen(
            [*command, "--run-dir", str(run_dir)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output, _ = train(whole).communicate(timeout=200)
    assert [step for step, *_ in numbers(whole)] == list(range(1, 9)), output
    process = train(killed)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints/step-00000003").exists() or len(numbers(killed)) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    pids = json.loads((killed / "logs/attempt-1/pids-0.json").read_text())
    os.kill(pids["1"], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "rank 1 was killed by SIGKILL" in output
    assert "from step 3" in output or "from step 6" in output
    assert numbers(killed) == numbers(whole)
