"""What watching costs: `mneme bench monitor`.

One rank trains `v4_nano` on the quick start's corpus, and every other group of ten steps goes without
monitors, in the same process: residual gains (one step of ten is looked at), gates and costs of the
memory, routing, expert loads (one row of twenty steps), alarms, utilization, and the record itself.
Steps of a kind are compared by their lower quartile, which the rest of the machine disturbs least.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from unittest.mock import patch

import torch.distributed as dist

from launch.bench import Row
from launch.compose import compose
from train.build import build
from train.checkpoint.state import Progress
from train.loop import batch_shape, due, open_batches, timing
from train.metrics import MetricsLog, Monitor, Record
from train.monitor.alarms import Alarms
from train.step import train_step
from train.training import Training
from train.utilization import Peak, find_peak, utilization

GROUP, ROUNDS, WARM_UP = 10, 8, 10
TARGET = 1.0
OVERRIDES = [
    *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
    *(f"train.steps={WARM_UP + 2 * GROUP * ROUNDS}", "monitor.tensorboard=false"),
    *("monitor.wandb=false", "train.global_batch_size=8"),
]
_ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}


def run() -> list[Row]:
    """Train, and compare the kinds of steps."""
    with tempfile.TemporaryDirectory() as directory, patch.dict(os.environ, _ONE_RANK):
        training = build(compose("v4_nano", OVERRIDES).config)
        try:
            seconds = measure(training, Path(directory))
        finally:
            dist.destroy_process_group()
    off, plain, looked = (quantiles(seconds[kind], n=4)[0] for kind in ("off", "plain", "looked"))
    mean = ((GROUP - 1) * plain + looked) / GROUP
    cost = 100 * (mean / off - 1)
    return [
        Row(case="step without monitors", value=1e3 * off, unit="ms"),
        Row(case="step with monitors", value=1e3 * plain, unit="ms", peer=1e3 * off),
        Row(case="step in which the gains are looked at", value=1e3 * looked, unit="ms"),
        Row(
            case="cost of all monitors, mean over steps",
            value=cost,
            unit="% of a step",
            target=TARGET,
            met=cost <= TARGET,
        ),
    ]


def measure(training: Training, directory: Path) -> dict[str, list[float]]:
    """Seconds of the steps of each kind."""
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    monitors, peak = list(training.monitors), find_peak(training)
    every = training.config.monitor.residual_every_steps
    seconds: dict[str, list[float]] = {"off": [], "plain": [], "looked": []}
    with MetricsLog(directory, [], 0) as log:
        for step in range(1, training.config.train.steps + 1):
            phase, batch, _ = next(batches)
            started = time.perf_counter()
            off = step > WARM_UP and (step - WARM_UP - 1) // GROUP % 2 == 1
            with without_monitors(training) if off else watching(training, monitors):
                record = train_step(training, batch, step)
                record |= batch_shape(phase)
                record |= timing(training, phase.tokens_per_step, started, started)
                if not off:
                    watch(training, step, record, log, peak)
            if step > WARM_UP:
                kind = "off" if off else "looked" if due(step, every, 0) else "plain"
                seconds[kind].append(time.perf_counter() - started)
    return seconds


def watch(training: Training, step: int, record: Record, log: MetricsLog, peak: Peak) -> None:
    """What `train.loop` does with a record."""
    config = training.config.monitor
    record["model_flops_utilization"] = utilization(training, training.phase(step), record, peak)
    Alarms(config.alarms).check(record)
    log.write({"step": step, **record})
    if due(step, config.expert_load_every_steps, 0):
        log.write_expert_load(step, training.expert_load.take())


@contextmanager
def watching(training: Training, monitors: list[Monitor]) -> Iterator[None]:
    """With all monitors."""
    training.monitors[:] = monitors
    yield


@contextmanager
def without_monitors(training: Training) -> Iterator[None]:
    """Nothing is watched; the routers' biases still move."""
    training.monitors.clear()
    with patch("train.step.routing_metrics", lambda counts, largest: {}):
        yield
