"""A process with `v4_nano`'s model and a table of some size, which trains a step when told to.

Every step reads the same number of distinct rows, other ones each time: hashing n-grams of a text
would touch fewer rows of a small table than of a large one, because there more n-grams share a row.
"""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from data.loader import Batch
from launch.compose import compose
from parallel.engram_plan import StepPlan, plan_step
from parallel.engram_rows import RowStore
from train.build import build
from train.config import RunConfig
from train.step import train_step
from train.training import Training

SEQUENCES, LENGTH = 4, 512
DISTINCT_PER_HEAD = 1024
"""Rows that a step reads of each head's table, each of them twice."""


class StepProcess:
    """The parent's end."""

    def __init__(self, rows: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.of_engram.step", str(rows)],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def step(self) -> float:
        """Seconds of one."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the step's process ended with {self._process.wait()}")
        return float(line)


def recipe(rows: int) -> RunConfig:
    """`v4_nano` on one rank, with about as many rows, on row-wise Adagrad."""
    config = compose("v4_nano").config
    assert config.model.engram is not None
    heads = len(config.model.engram.ngram_orders) * config.model.engram.num_heads
    overrides = {
        "parallel.data_parallel_size": 1,
        "parallel.expert_parallel_size": 1,
        "parallel.engram.storage": "memory",
        "optim.engram_optimizer": "adagrad",
        "model.engram.rows_per_head": rows // heads,
        "train.global_batch_size": SEQUENCES,
        "train.micro_batch_size": SEQUENCES,
        "data.sequence_length": LENGTH,
        "evaluate.num_sequences": SEQUENCES,
    }
    return compose("v4_nano", [f"{key}={value}" for key, value in overrides.items()]).config


def batch(config: RunConfig) -> Batch:
    """Random ids, one document a sequence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.model.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).expand(SEQUENCES, -1)
    return Batch(
        input_ids=ids[:, :-1],
        labels=ids[:, 1:].contiguous(),
        position_ids=places,
        document_ids=torch.zeros_like(places),
    )


def plan(training: Training, like: StepPlan, generator: np.random.Generator) -> StepPlan:
    """Other rows for the same tokens: of every head one from each of as many equal parts."""
    assert training.memory is not None
    geometry = training.memory.geometry
    columns = []
    for table in geometry.tables:
        for offset, modulus in zip(table.offsets, table.moduli, strict=True):
            edges = np.linspace(0, modulus, DISTINCT_PER_HEAD + 1).astype(np.int64)
            rows = table.first_row + offset + generator.integers(edges[:-1], edges[1:])
            tokens = generator.permutation(len(like.places)) % DISTINCT_PER_HEAD
            columns.append(rows[tokens])
    ids = np.stack(columns, axis=1)
    return plan_step(ids, like.places, like.limits, num_rows=geometry.num_rows, ranks=1)


def touch_every_page(store: RowStore) -> None:
    """The time for pages that are touched first is no cost of a table that is in use."""
    for array in store.arrays.values():
        array.fill(0)


def main(rows: int) -> None:
    """Answer every line on stdin by the seconds of a step."""
    config = recipe(rows)
    training = build(config)
    assert training.memory is not None
    training.memory.service.submit(touch_every_page).result()
    tokens, generator = batch(config), np.random.default_rng(0)
    like = training.memory.plan(tokens)
    training.memory.announce(1, plan(training, like, generator))
    print(0.0, flush=True)
    for step, _ in enumerate(sys.stdin, start=1):
        ahead = plan(training, like, generator)
        start = time.perf_counter()
        training.memory.announce(step + 1, ahead)
        train_step(training, tokens, step)
        print(time.perf_counter() - start, flush=True)
    training.memory.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
