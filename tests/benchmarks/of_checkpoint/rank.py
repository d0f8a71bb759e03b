"""What the ranks of `mneme bench checkpoint` do: our saves and loads, and the same bytes by themselves.

`python -m tests.benchmarks.of_checkpoint.rank FOLDER ROUNDS` prints it as JSON.
"""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from parallel.backend.cpu import CpuBackend
from tests.harness import run_distributed
from train.checkpoint.saver import CheckpointSaver
from train.checkpoint.state import Progress, restore
from train.config import CheckpointConfig
from train.engine import DataEngine
from train.training import Training

LARGE, LARGE_NUMBERS = 30, 2**21
"""Weights of each rank, and numbers in its shard of one: 8 MiB in fp32; AdamW has two more of each."""
SMALL, SMALL_NUMBERS = 120, 256
BLOCK_BYTES = 1 << 24

Seconds = dict[str, list[float]]


class Engine:
    """Weights and AdamW's states over two ranks, as FSDP2 has them."""

    def __init__(self) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._state: dict[str, DTensor] = {}
        for number in range(LARGE + SMALL):
            size = LARGE_NUMBERS if number < LARGE else SMALL_NUMBERS
            for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
                shard = torch.randn(size // 256, 256)
                self._state[f"{kind}.{number}"] = DTensor.from_local(shard, mesh, [Shard(0)])

    def state(self, *, only_weights: bool = False) -> dict[str, DTensor]:
        """The live tensors."""
        return dict(self._state)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """They are in place."""

    @property
    def num_bytes(self) -> int:
        """Of this rank."""
        return sum(value.to_local().nbytes for value in self._state.values())


def measure(rank: int, folder: Path, rounds: int) -> tuple[int, Seconds]:
    """Bytes of all ranks, and the seconds of each kind of work in each round, the first a warm-up."""
    gc.freeze()  # as a run has it, see `train.lifetime.fast_imports`
    engine, model = Engine(), SimpleNamespace(state_dict=dict, named_buffers=tuple)
    group = dist.new_group(backend="gloo")
    found: Seconds = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        os.sync()
        dist.barrier()
        started = time.perf_counter()
        work()
        if name != "blocked":
            dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - started)

    def saver(asynchronous: bool) -> CheckpointSaver:
        config = SimpleNamespace(
            checkpoint=CheckpointConfig(asynchronous=asynchronous, keep_last=9)
        )
        training = SimpleNamespace(
            config=config,
            model=model,
            engine=engine,
            backend=CpuBackend(),
            save_group=group,
            tables=None,
        )
        return CheckpointSaver(cast("Training", training), folder, corpus="")

    waits, behind = saver(asynchronous=False), saver(asynchronous=True)
    data = folder / f"raw-{rank}"
    content = torch.cat([v.to_local().flatten() for v in engine.state().values()]).numpy()
    steps = count(1)

    def save_behind() -> None:
        timed("blocked", partial(behind.save, progress(next(steps))))
        timed("behind", behind.wait)

    writes: list[Callable[[], None]] = [
        lambda: timed("raw write", lambda: write(data, content.data.cast("B"))),
        lambda: timed("save", lambda: waits.save(progress(next(steps)))),
        save_behind,
    ]
    reads: list[Callable[[], None]] = [
        lambda: timed("raw read", lambda: read(data, content.data.cast("B"))),
        lambda: timed("load", lambda: load(folder, model, engine)),
    ]
    for number in range(rounds + 1):
        # Who comes first differs: a drive may be faster after a rest, and memory that was in use before.
        for work in rotated(writes, number):
            work()
        dist.barrier()
        for path in (data, *(folder / "checkpoints").rglob("*")):
            drop(path)
        for work in rotated(reads, number):
            work()
        dist.barrier()
        data.unlink()
        if rank == 0:
            shutil.rmtree(folder / "checkpoints")
    return engine.num_bytes * dist.get_world_size(), found


def rotated(works: Sequence[Callable[[], None]], number: int) -> list[Callable[[], None]]:
    """All of them, beginning with another one each time."""
    begin = number % len(works)
    return [*works[begin:], *works[:begin]]


def progress(step: int) -> Progress:
    """Of a run without data."""
    return Progress(step=step, tokens=0, data_state={})


def load(folder: Path, model: Any, engine: Engine) -> None:
    """Into the live tensors."""
    rng = torch.get_rng_state()
    assert restore(
        folder, model, cast("DataEngine", engine), [], rng_state=rng, tables=None, corpus=""
    )


def write(path: Path, content: memoryview) -> None:
    """The bytes alone, durable."""
    with path.open("wb", buffering=0) as stream:
        for begin in range(0, len(content), BLOCK_BYTES):
            stream.write(content[begin : begin + BLOCK_BYTES])
        os.fsync(stream.fileno())


def read(path: Path, room: memoryview) -> None:
    """The bytes alone."""
    with path.open("rb", buffering=0) as stream:
        begin = 0
        while number := stream.readinto(room[begin : begin + BLOCK_BYTES]):
            begin += number
    assert begin == len(room)


def drop(path: Path) -> None:
    """Let the operating system forget what it keeps of a file."""
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    answers = run_distributed(measure, 2, Path(sys.argv[1]), int(sys.argv[2]), timeout=600.0)
    sys.stdout.write(json.dumps(answers))
