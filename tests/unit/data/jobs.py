"""Jobs for the tests of worker processes, which import them by this module's name."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from data.faults import DamagedSampleError, Fault

FAULT = Fault("docs", "shard-000001.tar", "docs/0007", "checksum", "flipped")


class AwkwardError(Exception):
    """Cannot be made from its own message."""

    def __init__(self, number: int, word: str) -> None:
        super().__init__(f"{word} {number}")


def numbers(start: int) -> Iterator[Tensor]:
    """start, start + 1, ... as tensors of a megabyte."""
    for number in count(start):
        yield torch.full((2**17,), number)


def pids() -> Iterator[int]:
    while True:
        yield os.getpid()


def slow(marks: Path) -> Iterator[int]:
    """Says in a file that it is at work, and for long gives nothing."""
    marks.joinpath(str(os.getpid())).touch()
    yield os.getpid()
    time.sleep(600)


def fails(kind: str) -> Iterator[int]:
    yield 1
    if kind == "awkward":
        raise AwkwardError(3, "word")
    if kind == "damaged":
        raise DamagedSampleError(FAULT, "restore it")
    raise ValueError("data.path=x: is wrong; use y")


def state_of_the_process() -> Iterator[tuple[int, int, set[int], list[str]]]:
    """Process id, threads of torch, signals that are blocked, and modules of this package that are loaded."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    while True:
        yield os.getpid(), torch.get_num_threads(), set(map(int, blocked)), sorted(sys.modules)
