"""Forked ranks that join the process group of a backend, as ranks of a run do."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.backend.conformance.checks import Ranks
from parallel.backend.conformance.suite import SUITE
from parallel.backend.select import select_backend
from tests.harness import run_distributed


def leave_harness(port: int) -> None:
    """Leave the group of the harness, for one that is joined by elastic's variables."""
    dist.barrier()  # a rank that left would break the connections that others are making
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ.pop("MNEME_BACKEND", None)


def run_on(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 50.0) -> Any:
    """`run_distributed` of `function(rank, port, *args)`, with a store on a free port."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    return run_distributed(function, world_size, store.port, *args, timeout=timeout)


def join(name: str, port: int, timeout_seconds: float = 20.0) -> Backend:
    """Leave the group of the harness and join that of a backend."""
    leave_harness(port)
    backend = select_backend(name)
    backend.init_process_group(timeout_seconds)
    return backend


def ranks_of(backend: Backend, timeout_seconds: float = 20.0) -> Ranks:
    """What a check is given."""
    return Ranks(
        backend=backend,
        device=backend.device(dist.get_rank()),
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        timeout_seconds=timeout_seconds,
    )


def run_suite(ranks: Ranks) -> dict[str, str | None]:
    """What each check that leaves the ranks alive found, by name."""
    found: dict[str, str | None] = {}
    for check in SUITE.values():
        if check.ends_ranks:
            continue
        try:
            check.run(ranks)
        except Exception as error:  # the test reports it
            found[check.name] = f"{type(error).__name__}: {error}"
        else:
            found[check.name] = None
    return found
