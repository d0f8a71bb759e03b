"""The runner with real processes: signals, crashes, exit codes, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RUNNER = """
import sys
from pathlib import Path
from launch.local import run_ranks
from parallel.config import ParallelConfig
from train.config import LaunchConfig, RunConfig, TrainConfig

config = RunConfig(
    name="toy",
    parallel=ParallelConfig(data_parallel_size=int(sys.argv[2])),
    train=TrainConfig(steps=5),
    launch=LaunchConfig(stop_deadline_seconds=float(sys.argv[3]), threads_per_rank=3),
)
code = run_ranks(Path(sys.argv[1]), config, module="tests.distributed.toy_rank")
assert "torch" not in sys.modules
sys.exit(code)
"""


class Launcher:
    """A launcher process with toy ranks."""

    def __init__(self, run_dir: Path, ranks: int, deadline: float, toy: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(run_dir), str(ranks), str(deadline)],
            env=os.environ | {"TOY": json.dumps(toy), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not what():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def wait_for_steps(self) -> None:
        self.wait_for((self.run_dir / "metrics.jsonl").exists)

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output

    def alive(self, names: str = "pid-*") -> list[int]:
        pids = [int(path.read_text()) for path in self.run_dir.glob(names)]
        return [pid for pid in pids if is_alive(pid)]

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return found


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def start(ranks: int = 2, deadline: float = 10.0, **toy: Any) -> Launcher:
        started.append(Launcher(tmp_path, ranks, deadline, toy))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.communicate()


def test_ranks_meet_over_gloo_and_leave_logs_and_a_status(launch: Callable[..., Launcher]) -> None:
    launcher = launch(gloo=True)
    code, output = launcher.finish()
    assert code == 0, output
    assert launcher.status == {
        "state": "done",
        "step": 5,
        "tokens": 40,
        "last_checkpoint": "checkpoints/step-00000005",
        "reason": "all steps done",
        "ranks": 2,
    }
    for rank in range(2):
        log = (launcher.run_dir / f"logs/attempt-1/rank-{rank}.log").read_text()
        assert log == f"rank {rank} on stderr\nrank {rank} of 2, threads 3, safe path True\n"
    assert "step 5/5" in output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_the_next_attempt_goes_on(
    launch: Callable[..., Launcher], name: str
) -> None:
    launcher = launch(steps=10**6)
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.Signals[name])
    code, output = launcher.finish()  # the ranks leave 0.3 s apart
    assert code == 85, output
    assert launcher.status["state"] == "stopped"
    assert name in launcher.status["reason"]
    assert launcher.alive() == []
    step = launcher.status["step"]
    assert launcher.status["last_checkpoint"] == f"checkpoints/step-{step:08d}"
    again = launch(steps=step + 2)
    assert again.finish()[0] == 0
    rows = (again.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == list(range(1, step + 3))
    assert (again.run_dir / "logs/attempt-2/rank-1.log").exists()


def test_a_signal_before_the_ranks_listen_is_kept_for_them(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, slow_start=1.0)
    launcher.wait_for((launcher.run_dir / "pid-1").exists)
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 85, output
    assert launcher.status["step"] >= 1


def test_a_second_ctrl_c_kills_at_once(launch: Callable[..., Launcher]) -> None:
    launcher = launch(steps=10**6, hang_on_stop=[0, 1])
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert launcher.process.poll() is None
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.finish()
    assert time.monotonic() - started < 2.0
    assert code == 1
    assert "second Ctrl-C" in output
    assert launcher.alive() == []


def test_a_rank_that_does_not_save_in_time_is_killed_and_named(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, hang_on_stop=[1], deadline=0.8)
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 1
    assert "rank 1 had not saved and left 0.8 s after the stop request" in output
    assert "launch.stop_deadline_seconds" in output
    assert launcher.status["state"] == "failed"
    assert launcher.alive() == []


def test_the_rank_that_failed_first_is_named_not_its_victims(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(gloo=True, record=True, crash=[1], steps=10**6)
    code, output = launcher.finish()
    assert code == 1
    assert "rank 1 failed: ValueError: the toy broke" in output
    assert "toy_rank.py" in output
    assert str(launcher.run_dir / "logs/attempt-1/rank-1.log") in output
    assert launcher.status["state"] == "failed"
    assert "the toy broke" in launcher.status["reason"]
    assert launcher.alive() == []


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        ({"segfault": [1]}, "rank 1 was killed by SIGSEGV"),
        ({"bad_exit": [0]}, "rank 0 failed: exit code 3\n  rank 0 on stderr"),
    ],
)
def test_a_failure_without_a_record_is_explained_and_ends_the_others(
    launch: Callable[..., Launcher], toy: dict[str, Any], said: str
) -> None:
    launcher = launch(steps=10**6, child=[0, 1], **toy)
    code, output = launcher.finish()
    assert code == 1
    assert said in output
    assert launcher.alive() == []
    assert len(list(launcher.run_dir.glob("child-*"))) == 2
    assert launcher.alive("child-*") == []


def test_children_that_a_finished_rank_left_are_killed(launch: Callable[..., Launcher]) -> None:
    launcher = launch(child=[0])
    assert launcher.finish()[0] == 0
    assert (launcher.run_dir / "child-0").exists()
    assert launcher.alive("child-*") == []


def test_ranks_die_with_a_launcher_that_is_killed(launch: Callable[..., Launcher]) -> None:
    launcher = launch(steps=10**6)
    launcher.wait_for_steps()
    launcher.wait_for((launcher.run_dir / "pid-1").exists)
    assert len(launcher.alive()) == 2
    launcher.process.kill()
    launcher.process.wait()
    deadline = time.monotonic() + 2.0
    while launcher.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert launcher.alive() == []
    assert launcher.status["state"] == "running"  # nobody was left to say otherwise
    assert launch(steps=10**6 + 1, crash=[0]).finish()[0] == 1  # and the directory is free again


def test_a_run_has_one_launcher_at_a_time(launch: Callable[..., Launcher]) -> None:
    first = launch(steps=10**6)
    first.wait_for_steps()
    code, output = launch().finish()
    assert code == 1
    assert "is being trained by another mneme process" in output
    assert first.process.poll() is None
    assert len(first.alive()) == 2
