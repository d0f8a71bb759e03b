"""Time to an answer of the commands that need no tensors: `mneme bench cli`.

A new process each time, as a user has it. The peer is `import torch` in a new process: what the
same answer would cost at least if the command imported the trainer.
"""

import statistics
import subprocess
import sys
import time

from launch.bench import Row

REPEATS = 5
TARGET_SECONDS = 1.0
COMMANDS = (
    ("list",),
    ("show", "v4_nano"),
    ("show", "v4_nano", "train.steps=200", "model.engram=null"),
)


def run() -> list[Row]:
    """Median wall time of each command."""
    peer = median_seconds("-c", "import torch")
    rows = []
    for command in COMMANDS:
        seconds = median_seconds("-m", "launch.cli", *command)
        rows.append(
            Row(
                case=f"mneme {' '.join(command)} | import torch",
                value=seconds,
                unit="s",
                peer=peer,
                ratio=seconds / peer,
                target=TARGET_SECONDS,
                met=seconds < TARGET_SECONDS,
            )
        )
    return rows


def median_seconds(*arguments: str) -> float:
    """Wall time of a Python process, the first run left out: it fills the file cache."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
