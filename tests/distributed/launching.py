"""A launcher process with toy ranks, for tests of how runs start, end, and start again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from launch.ranks import RunnerFiles
from launch.run_dir import last_attempt_logs

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import sys
from pathlib import Path
from launch.local import run_ranks
from parallel.config import ParallelConfig
from train.config import LaunchConfig, RunConfig, TrainConfig

config = RunConfig(
    name="toy",
    parallel=ParallelConfig(data_parallel_size=int(sys.argv[2])),
    train=TrainConfig(steps=5),
    launch=LaunchConfig(
        stop_deadline_seconds=float(sys.argv[3]),
        threads_per_rank=3,
        max_restarts_without_progress=int(sys.argv[5]),
    ),
)
code = run_ranks(Path(sys.argv[1]), config, module=sys.argv[4])
assert "torch" not in sys.modules
sys.exit(code)
"""


class Launcher:
    """A launcher process with toy ranks."""

    def __init__(
        self,
        run_dir: Path,
        toy: dict[str, Any],
        *,
        ranks: int,
        deadline: float,
        module: str,
        restarts: int,
        backend: str = "cpu",
    ) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER]
            + [str(word) for word in (run_dir, ranks, deadline, module, restarts)],
            env=os.environ
            | {"TOY": json.dumps(toy), "PYTHONPATH": str(ROOT), "MNEME_BACKEND": backend},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not what():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def wait_for_steps(self) -> None:
        self.wait_for((self.run_dir / "metrics.jsonl").exists)

    def wait_for_both(self, names: str = "pid-*") -> None:
        self.wait_for(lambda: sum(bool(p.read_text()) for p in self.run_dir.glob(names)) == 2)

    @property
    def runner(self) -> psutil.Process:
        launcher = psutil.Process(self.process.pid)
        self.wait_for(lambda: any("launch.runner" in c.cmdline() for c in launcher.children()))
        [found] = launcher.children()
        return found

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=100)
        return self.process.returncode, output

    def alive(self, names: str = "pid-*") -> list[int]:
        pids = [int(path.read_text()) for path in self.run_dir.glob(names)]
        return [pid for pid in pids if is_alive(pid)]

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return found

    @property
    def exit_codes(self) -> dict[str, int]:
        """Of the ranks of the newest attempt."""
        path = max(self.run_dir.glob("logs/attempt-*")) / "exit-codes-0.json"
        found: dict[str, int] = json.loads(path.read_text())
        return found


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The rank processes of the newest attempt on node 0, in order, without those that are gone."""
    logs = last_attempt_logs(run_dir)
    assert logs is not None
    pids: dict[str, int] = json.loads(RunnerFiles(logs, node=0).pids.read_text())
    return [psutil.Process(pids[r]) for r in sorted(pids, key=int) if psutil.pid_exists(pids[r])]
