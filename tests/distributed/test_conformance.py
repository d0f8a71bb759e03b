"""The conformance suite on backends without hardware; and that it notices what is wrong.

`mneme doctor` runs the same checks on the user's hardware, tests/gpu on CUDA.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.backend.conformance.failures import LEAVER_EXIT_CODE
from parallel.backend.conformance.suite import SUITE
from tests.distributed.backend_ranks import join, ranks_of, run_on, run_suite
from tests.harness import fork_ranks

BACKENDS = ("cpu", "simulated")
LIVING = [check.name for check in SUITE.values() if not check.ends_ranks]


def conform(rank: int, port: int, name: str) -> dict[str, str | None]:
    backend = join(name, port)
    assert dist.get_backend() == backend.process_group_backend
    return run_suite(ranks_of(backend))


@cache
def outcome(name: str, world_size: int) -> list[dict[str, str | None]]:
    found: list[dict[str, str | None]] = run_on(conform, world_size, name)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", LIVING)
def test_two_ranks_conform(backend: str, check: str) -> None:
    assert [rank[check] for rank in outcome(backend, 2)] == [None, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_conform(backend: str, ranks: int) -> None:
    for found in outcome(backend, ranks):
        assert found == dict.fromkeys(LIVING)


def replace_function(module: Any, name: str, change: Callable[..., Any]) -> None:
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def no_sum(backend: Backend) -> None:
    dist.all_reduce = lambda *args, **kwargs: None


def bf16_in_sums(backend: Backend) -> None:
    def inexact(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = original(x, *args, **kwargs)
        if x.dtype == torch.float32:
            x.copy_(x.bfloat16())
        return work

    replace_function(dist, "all_reduce", inexact)


def different_sums(backend: Backend) -> None:
    def rank_dependent(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = original(x, *args, **kwargs)
        if x.numel() > 1000 and x.dtype == torch.float32 and dist.get_rank() == 1:
            x.mul_(1 + 2**-22)
        return work

    replace_function(dist, "all_reduce", rank_dependent)


def even_splits(backend: Backend) -> None:
    def ignore_splits(
        original: Any, received: Any, sent: Any, take: Any = None, give: Any = None, **kwargs: Any
    ) -> Any:
        work = original(received, sent, take, give, **kwargs)
        if take and 0 in take:
            received.zero_()
        return work

    replace_function(dist, "all_to_all_single", ignore_splits)


def no_barrier(backend: Backend) -> None:
    dist.barrier = lambda *args, **kwargs: None


def one_group(backend: Backend) -> None:
    replace_function(dist, "new_group", lambda original, *args, **kwargs: dist.group.WORLD)


def claims(**capabilities: bool) -> Callable[[Backend], None]:
    def claim(backend: Backend) -> None:
        kind = type(backend)
        kind.capabilities = replace(kind.capabilities, **capabilities)

    return claim


def no_seed(backend: Backend) -> None:
    type(backend).manual_seed = lambda self, seed: None  # type: ignore[method-assign]


def no_peak(backend: Backend) -> None:
    type(backend).reset_peak_memory = lambda self: None  # type: ignore[method-assign]


SABOTAGES: dict[str, tuple[Callable[[Backend], None], str, str]] = {
    "no sum": (no_sum, "cpu", "all-reduce sum"),
    "no largest": (no_sum, "cpu", "all-reduce max, min"),
    "no sum in a group": (no_sum, "cpu", "meshes"),
    "bf16 in sums": (bf16_in_sums, "cpu", "all-reduce sum"),
    "different sums": (different_sums, "cpu", "repeatable sums"),
    "even splits": (even_splits, "cpu", "uneven all-to-all"),
    "no barrier": (no_barrier, "cpu", "barrier"),
    "one group": (one_group, "cpu", "groups"),
    "no seed": (no_seed, "cpu", "random numbers"),
    "no peak": (no_peak, "cpu", "peak memory"),
    "claims an average": (claims(native_average=True), "simulated", "averages"),
    "claims fp64": (claims(fp64=True), "simulated", "all-reduce fp64"),
    "claims pinned memory": (claims(pinned_memory=True), "cpu", "pinned memory"),
}
"""What is done to a backend, which one, and the check that has to notice."""


def conform_alone(
    rank: int, port: int, check: str, backend: str, sabotage: str, answers: Path
) -> None:
    """Run one check and leave what it found in a file: the ranks may be out of step afterwards."""
    own = join(backend, port, timeout_seconds=1.0)
    if sabotage:
        SABOTAGES[sabotage][0](own)
    found = ""
    try:
        SUITE[check].run(ranks_of(own, 1.0))
    except Exception as error:  # the test reports it
        found = f"{type(error).__name__}: {error}"
    (answers / f"{rank}.tmp").write_text(found)
    (answers / f"{rank}.tmp").replace(answers / str(rank))
    time.sleep(20.0)  # the store, which a rank may have, outlives what others still ask


def answers_of(
    ranks: int, check: str, backend: str, directory: Path, *, sabotage: str = "", living: int = 0
) -> tuple[list[str], list[int | None]]:
    """What each rank found, or the first `living` of them, and how the others left."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    arguments = (store.port, check, backend, sabotage, directory)
    processes = fork_ranks(conform_alone, ranks, directory / "store", *arguments)
    expected = [directory / str(rank) for rank in range(living or ranks)]
    try:
        deadline = time.monotonic() + 15.0
        while not all(path.exists() for path in expected):
            assert time.monotonic() < deadline, "a rank hangs"
            time.sleep(0.01)
        others = processes[len(expected) :]
        for process in others:
            process.join(5.0)
        return [path.read_text() for path in expected], [other.exitcode for other in others]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_what_is_wrong_is_noticed(sabotage: str, tmp_path: Path) -> None:
    _, backend, check = SABOTAGES[sabotage]
    found, _ = answers_of(2, check, backend, tmp_path, sabotage=sabotage)
    assert any(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_does_not_come_is_noticed(backend: str, tmp_path: Path) -> None:
    found, _ = answers_of(3, "late rank", backend, tmp_path)
    assert found == ["", "", ""]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_dies_is_noticed(backend: str, tmp_path: Path) -> None:
    found, left = answers_of(3, "dead rank", backend, tmp_path, living=2)
    assert (found, left) == (["", ""], [LEAVER_EXIT_CODE])


def test_every_check_says_what_it_is_for_and_what_to_do() -> None:
    for check in SUITE.values():
        assert check.needed_for, check.name
        assert check.fix, check.name
