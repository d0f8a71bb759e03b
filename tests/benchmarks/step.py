"""Speed of training steps of `v4_nano` on this machine: `mneme bench step`.

The median over the steps after warm-up of whole runs through the command line, on the quick start's
corpus, with the quick start's layout and with one rank that has a thread for every core. Tokens per
second per core divides by the cores of the machine, all of which both use.

On an accelerator: one rank of a part of `v4_mini` in bf16, and the share of the matmul rate that six
operations for each active parameter and token make.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from launch.bench import Row
from launch.compose import compose
from tests.benchmarks.of_device.clock import Device
from train.model.count import count_parameters

STEPS, WARM_UP = 30, 5
LAYOUTS = {
    "4 ranks, fully sharded, expert parallel 2": [],
    "1 rank": ["parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"],
}


PART = [
    *("data=quickstart", "parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
    *("model.num_layers=8", "model.moe.num_experts=16", "model.engram.layers=[1]"),
    *("model.engram.rows_per_head=20000", "data.num_lanes=null", "optim.warmup_steps=2"),
    *("train.global_batch_size=8", "train.micro_batch_size=4", "data.sequence_length=4096"),
]
"""Of `v4_mini`: the widths stay, but start values are made in seconds."""
ON_DEVICE = {
    "8 layers of v4_mini, bf16": PART,
    "8 layers of v4_mini, bf16, compiled streams": [*PART, "model.hyper_connection.compile=true"],
}


def run() -> list[Row]:
    """Measure every layout, one after the other."""
    device = Device()
    if not device.is_host:
        rate = device.matmul_rate(torch.bfloat16, 8192, repeats=5)
        rows = [Row(case="bf16 matmul rate", value=rate / 1e9, unit="GFLOP/s")]
        for name, overrides in ON_DEVICE.items():
            rows += on_device(name, overrides, rate)
        return rows
    rows = []
    for name, overrides in LAYOUTS.items():
        speed = measure("v4_nano", overrides)
        cores = len(os.sched_getaffinity(0))
        rows.append(Row(case=f"v4_nano, {name}", value=speed, unit="tokens/s"))
        rows.append(Row(case=f"v4_nano, {name}", value=speed / cores, unit="tokens/s per core"))
    return rows


def on_device(name: str, overrides: list[str], rate: float) -> list[Row]:
    """Speed of a run, and its share of the matmul rate."""
    speed = measure("v4_mini", [*overrides, f"train.steps={WARM_UP + 7}"])
    active = count_parameters(compose("v4_mini", overrides).config.model).active
    share = 6 * active * speed / rate
    print(name, speed, share, file=sys.stderr, flush=True)
    return [
        Row(case=name, value=speed, unit="tokens/s"),
        Row(case=f"{name}: share of the matmul rate", value=share, unit=""),
    ]


def measure(recipe: str, overrides: list[str]) -> float:
    """Median tokens per second of one run; the last `train.steps` counts."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        subprocess.run(
            [
                *(sys.executable, "-m", "launch.cli", "train", recipe),
                *(
                    f"train.steps={STEPS}",
                    *overrides,
                    "evaluate.every_steps=0",
                    "monitor.wandb=false",
                ),
                *("--run-dir", str(run_dir)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds: list[float] = [json.loads(line)["tokens_per_second"] for line in lines[WARM_UP:]]
    return statistics.median(speeds)
