"""Speed of training steps of `v4_nano` on this machine: `mneme bench step`.

The median over the steps after warm-up of whole runs through the command line, on the quick start's
corpus, with the quick start's layout and with one rank that has a thread for every core. Tokens per
second per core divides by the cores of the machine, all of which both use.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.bench import Row

STEPS, WARM_UP = 30, 5
LAYOUTS = {
    "4 ranks, fully sharded, expert parallel 2": [],
    "1 rank": ["parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"],
}


def run() -> list[Row]:
    """Measure every layout, one after the other."""
    rows = []
    for name, overrides in LAYOUTS.items():
        speed = measure(overrides)
        cores = len(os.sched_getaffinity(0))
        rows.append(Row(case=f"v4_nano, {name}", value=speed, unit="tokens/s"))
        rows.append(Row(case=f"v4_nano, {name}", value=speed / cores, unit="tokens/s per core"))
    return rows


def measure(overrides: list[str]) -> float:
    """Median tokens per second of one run."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        subprocess.run(
            [
                *(sys.executable, "-m", "launch.cli", "train", "v4_nano", *overrides),
                *(f"train.steps={STEPS}", "evaluate.every_steps=0", "monitor.wandb=false"),
                *("--run-dir", str(run_dir)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds: list[float] = [json.loads(line)["tokens_per_second"] for line in lines[WARM_UP:]]
    return statistics.median(speeds)
