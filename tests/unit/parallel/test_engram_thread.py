"""The thread of the tables and the one of the data loader: how many OpenMP threads each may use."""

from collections.abc import Iterator

import pytest
import torch

from data.prefetch import prefetch
from parallel.engram_thread import JobThread


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_beside_the_models_have_no_team_of_their_own() -> None:
    jobs = JobThread("rank 0")
    assert jobs.submit(torch.get_num_threads, "count").result(timeout=60) == 1
    jobs.close(60.0)
    assert next(prefetch(iter(torch.get_num_threads, None), 1)) == 1
    assert torch.get_num_threads() == 2
