"""Several nodes on this machine: one `launch.node` each, with toy ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from launch.host import reserved_port
from launch.node import main
from parallel.config import ParallelConfig
from tests.distributed.launching import ROOT, is_alive
from train.config import LaunchConfig, RunConfig
from train.recipe import load_resolved, save_resolved

TOY_RANK = "tests.distributed.toy_rank"


class Nodes:
    """Two nodes with two ranks each."""

    def __init__(self, run_dir: Path, port: int) -> None:
        self.run_dir = run_dir
        self.port = port
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.output: dict[int, str] = {}

    def start(self, node: int, run_dir: Path | None = None, **toy: Any) -> None:
        command = [sys.executable, "-m", "launch.node", str(run_dir or self.run_dir)]
        command += [f"--node={node}", f"--endpoint=127.0.0.1:{self.port}", f"--module={TOY_RANK}"]
        self.processes[node] = subprocess.Popen(
            command,
            env=os.environ | {"TOY": json.dumps(toy), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_both(self, **toy: Any) -> None:
        for node in (0, 1):
            self.start(node, **toy)

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_ranks(self, steps: int = 1) -> None:
        path = self.run_dir / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_text().count("\n") >= steps)
        self.wait_for(lambda: len(self.pids()) == 4)

    def pids(self) -> dict[int, int]:
        found = {rank: self.run_dir / f"pid-{rank}" for rank in range(4)}
        return {
            rank: int(p.read_text()) for rank, p in found.items() if p.exists() and p.read_text()
        }

    def alive(self) -> list[int]:
        return [pid for pid in self.pids().values() if is_alive(pid)]

    def finish(self, node: int) -> int:
        self.output[node], _ = self.processes[node].communicate(timeout=120)
        return self.processes[node].returncode

    def finish_both(self) -> tuple[int, int]:
        return self.finish(0), self.finish(1)

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return found

    @property
    def steps(self) -> list[int]:
        rows = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["step"] for row in rows]

    def exit_codes(self, attempt: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in (0, 1):
            path = self.run_dir / f"logs/attempt-{attempt}/exit-codes-{node}.json"
            found |= json.loads(path.read_text())
        return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    (tmp_path / "tokenizer.json").write_text("{}")  # node 0 looks for it
    config = RunConfig(
        name="toy",
        data=DataConfig(tokenizer=str(tmp_path / "tokenizer.json")),
        parallel=ParallelConfig(data_parallel_size=4),
        launch=LaunchConfig(nodes=2, join_deadline_seconds=30.0, stop_deadline_seconds=60.0),
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save_resolved(config, run_dir / "recipe.yaml")
    with reserved_port("") as port:
        found = Nodes(run_dir, port)
        yield found
    for process in found.processes.values():  # the ranks die with them
        process.kill()
        process.communicate()


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_stop_request_to_one_node_saves_on_all_and_the_next_start_goes_on(nodes: Nodes) -> None:
    """What torchrun loses: USR1 does not kill it, and exit code 85 comes through."""
    nodes.start_both(steps=10**6, gloo=True)
    nodes.wait_for_ranks()
    nodes.processes[1].send_signal(signal.SIGUSR1)
    assert nodes.finish_both() == (85, 85), nodes.output
    assert nodes.exit_codes(1) == dict.fromkeys("0123", 85)
    assert nodes.status["state"] == "stopped"
    assert "SIGUSR1" in nodes.status["reason"]
    assert nodes.alive() == []
    step = nodes.status["step"]
    assert nodes.status["last_checkpoint"] == f"checkpoints/step-{step:08d}"
    for rank in range(4):
        log = (nodes.run_dir / f"logs/attempt-1/rank-{rank}.log").read_text()
        assert f"rank {rank} of 4" in log
    nodes.start_both(steps=step + 3, gloo=True)
    assert nodes.finish_both() == (0, 0), nodes.output
    assert nodes.steps == list(range(1, step + 4))
    assert nodes.status["state"] == "done"
    assert nodes.status["ranks"] == 4


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_rank_that_is_killed_on_one_node_starts_all_nodes_again(nodes: Nodes) -> None:
    nodes.start_both(steps=4, gloo=True, record=True, crash_after_step=[3], crash_attempts=1)
    assert nodes.finish_both() == (0, 0), nodes.output
    assert "rank 3 was killed by SIGKILL" in nodes.output[0]
    assert "restart 1 of 3 without a new checkpoint, from the beginning" in nodes.output[0]
    assert "node 1: attempt 2, ranks 2 to 3" in nodes.output[1]
    rows = [json.loads(row) for row in (nodes.run_dir / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["rank"]) for row in rows] == [("restart", 3)]
    assert nodes.exit_codes(1)["3"] == -signal.SIGKILL
    assert nodes.exit_codes(2) == dict.fromkeys("0123", 0)
    assert nodes.alive() == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_that_is_lost_is_waited_for(nodes: Nodes) -> None:
    nodes.start_both(steps=10**6, save_every=1, gloo=True)
    nodes.wait_for_ranks(steps=2)
    before = nodes.pids()
    nodes.processes[1].kill()
    nodes.finish(1)
    nodes.wait_for(lambda: nodes.status["reason"] == "waiting for node 1")
    assert not any(is_alive(pid) for pid in before.values())
    lost_at = len(nodes.steps)
    nodes.start(1, steps=10**6, gloo=True)
    nodes.wait_for(lambda: len(nodes.steps) > lost_at + 1)  # one step may be there twice
    nodes.processes[0].send_signal(signal.SIGTERM)
    assert nodes.finish_both() == (85, 85), nodes.output
    assert "node 1 is gone: its launcher was killed" in nodes.output[0]
    assert "node 1: attempt 2, ranks 2 to 3" in nodes.output[1]
    steps = nodes.steps
    assert nodes.status["step"] == steps[-1] > lost_at


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_without_node_0_the_others_end_and_ask_to_be_started_again(nodes: Nodes) -> None:
    nodes.start_both(steps=10**6, gloo=True)
    nodes.wait_for_ranks()
    nodes.processes[0].kill()
    nodes.finish(0)
    assert nodes.finish(1) == 75, nodes.output
    assert "lost node 0" in nodes.output[1]
    nodes.wait_for(lambda: nodes.alive() == [])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_with_another_recipe_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = load_resolved(nodes.run_dir / "recipe.yaml")
    save_resolved(replace(config, name="other"), other / "recipe.yaml")
    nodes.start(0)
    nodes.start(1, other)
    assert nodes.finish(1) == 2, nodes.output
    assert "it runs another recipe.yaml" in nodes.output[1]
    nodes.processes[0].send_signal(signal.SIGTERM)  # it waits for the right one
    assert nodes.finish(0) == 85


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--node=2", "--endpoint=a:1"], "--node 2: launch.nodes=2, so use 0 to 1"),
        (["--node=1", "--endpoint=a"], "--endpoint a: must be HOST:PORT of node 0"),
        (["--endpoint=a:1"], "--node: missing, and none of SLURM_NODEID, PET_NODE_RANK"),
    ],
)
def test_wrong_input_is_2_and_a_message(
    nodes: Nodes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["node", str(nodes.run_dir), *arguments])
    assert main() == 2
    assert said in capsys.readouterr().err
