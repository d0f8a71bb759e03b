"""A real Slurm of two nodes for the tests in here, where its packages are installed."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Slurm, why_missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Skipped with the reason where there is no Slurm; fails if MNEME_REQUIRE_SLURM=1 wants one."""
    if reason := why_missing():
        if os.environ.get("MNEME_REQUIRE_SLURM") == "1":
            pytest.fail(f"MNEME_REQUIRE_SLURM=1, and {reason}")
        pytest.skip(f"NO SLURM, so nothing about it is tested: {reason}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
