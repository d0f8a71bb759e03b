"""What checkpoints cost: `mneme bench checkpoint`.

Two ranks save 1.5 GB of weights and AdamW's states with the code of the training loop, and read them
back. Beside that, in turns that begin with another one each round, each rank writes as many bytes to a
file of its own and makes them durable, and reads such a file that the operating system does not keep in
memory: that is what the disk can do.
Saves include the hashes, the manifest and the commit, and, like the writes, not the removal of older
ones. The ranks have the allocator's settings of a run. Medians over the rounds.

Then `v4_nano` with four ranks is killed in the middle: the time from kill -9 of one rank to the first
new record of the run.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launch.bench import Row
from launch.run_dir import last_record
from tests.distributed.launching import ranks_of
from train.lifetime import ALLOCATOR

ROUNDS = 3
RANKS = 4
BLOCKED_TARGET, BANDWIDTH_TARGET, RESTART_TARGET = 0.10, 0.70, 20.0


def run() -> list[Row]:
    """Saves and loads beside the raw disk, and a restart."""
    return [*bandwidths(), restart()]


def bandwidths() -> list[Row]:
    """By the code of the training loop, in two processes."""
    module = "tests.benchmarks.of_checkpoint.rank"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": ALLOCATOR}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        command = [sys.executable, "-m", module, folder, str(ROUNDS)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    results: list[tuple[int, dict[str, list[float]]]] = json.loads(output)
    size = results[0][0]
    seconds = {
        name: statistics.median(max(pair) for pair in zip(*of_ranks, strict=True))
        for name in results[0][1]
        for of_ranks in [[found[name][1:] for _, found in results]]
    }
    first = max(found["blocked"][0] for _, found in results)
    print(seconds, file=sys.stderr, flush=True)
    return [
        blocked(
            "asynchronous save, training held up (s), against a save that waits", seconds, None
        ),
        blocked("the same, first save of a run", seconds, first),
        share("save, bandwidth against the raw disk (ratio)", size, seconds, "save", "raw write"),
        share("load, bandwidth against the raw disk (ratio)", size, seconds, "load", "raw read"),
    ]


def blocked(case: str, seconds: dict[str, float], first: float | None) -> Row:
    """Time in which training cannot go on."""
    value = first or seconds["blocked"]
    ratio = value / seconds["save"]
    return Row(
        case=case,
        value=value,
        unit="s",
        peer=seconds["save"],
        ratio=ratio,
        target=None if first else BLOCKED_TARGET,
        met=None if first else ratio <= BLOCKED_TARGET,
    )


def share(case: str, size: int, seconds: dict[str, float], ours: str, raw: str) -> Row:
    """Our bandwidth beside that of the disk."""
    value, peer = (size / 1e9 / seconds[name] for name in (ours, raw))
    ratio = value / peer
    return Row(
        case=case,
        value=value,
        unit="GB/s",
        peer=peer,
        ratio=ratio,
        target=BANDWIDTH_TARGET,
        met=ratio >= BANDWIDTH_TARGET,
    )


def restart() -> Row:
    """From the death of a rank to the next step of the run, which the launcher starts again."""
    if not (Path("corpus") / "tokenizer.json").is_file():
        raise ValueError("corpus: not there; build it with `mneme data build quickstart`")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        run_dir = Path(folder) / "run"
        overrides = [f"parallel.data_parallel_size={RANKS}", "train.micro_batch_size=1"]
        overrides += ["checkpoint.every_steps=2", "evaluate.every_steps=0", "train.steps=100000"]
        overrides += ["monitor.wandb=false", "monitor.tensorboard=false"]
        process = mneme("train", "v4_nano", *overrides, "--run-dir", str(run_dir))
        try:
            wait_for(lambda: last_step(run_dir) >= 6, process)
            ranks_of(run_dir)[1].kill()
            killed = time.time()
            wait_for(lambda: last_step(run_dir) > resumed_after(run_dir, killed), process)
            seconds = time.time() - killed
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return Row(
        case=f"kill -9 of a rank of {RANKS} to the next step of all (v4_nano)",
        value=seconds,
        unit="s",
        target=RESTART_TARGET,
        met=seconds < RESTART_TARGET,
    )


def mneme(*arguments: str) -> "subprocess.Popen[bytes]":
    """A command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.Popen(command, stdout=sys.stderr, env=environment)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Until the run is so far."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError("the run did not get there")
        time.sleep(0.02)


def last_step(run_dir: Path) -> int:
    """Of the last whole record."""
    return int(found["step"]) if (found := last_record(run_dir)) else 0


def resumed_after(run_dir: Path, time_: float) -> float:
    """The step after which an attempt since that time goes on; infinite if there is none yet."""
    rows = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    steps = [row["step"] for row in rows if row["event"] == "resume" and row["time"] > time_]
    return max(steps, default=float("inf"))
