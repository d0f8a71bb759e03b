"""A process for the device and one for the host; figures that are worth reading at the end."""

from collections.abc import Callable, Iterator

import pytest

from parallel.backend.select import BACKENDS
from tests.gpu.worker import Worker

BACKEND = "cuda"
"""What is tested, against the host."""

_FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = terminalreporter.config.stash[_FIGURES]
    if figures:
        terminalreporter.section(f"{BACKEND} against the host")
        for figure in figures:
            terminalreporter.line(figure)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line after the tests."""
    return request.config.stash[_FIGURES].append


def _worker(backend: str) -> Iterator[Worker]:
    reason = BACKENDS[BACKEND]().why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    worker = Worker(backend)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def device() -> Iterator[Worker]:
    """The only rank on the device."""
    yield from _worker(BACKEND)


@pytest.fixture(scope="session")
def host() -> Iterator[Worker]:
    """The only rank on the host."""
    yield from _worker("cpu")
