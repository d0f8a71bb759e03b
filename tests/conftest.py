"""Fixtures that several folders of tests share."""

import gc
import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data.build import build_corpus
from data.corpus import package_docstrings, standard_library


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of real text, small enough for tests: sources `code` and `docs`, 512 tokens."""
    destination = tmp_path_factory.mktemp("corpus") / "tiny"
    skipped: Counter[str] = Counter()
    sources = {
        "code": islice(standard_library(skipped), 80),
        "docs": islice(package_docstrings(skipped), 80),
    }
    build_corpus(destination, sources, vocab_size=512, skipped=skipped, progress=False)
    return destination


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow tests do not start after MNEME_SLOW_TESTS_UNTIL, in seconds since 1970: see `.ci/run`."""
    until = float(os.environ.get("MNEME_SLOW_TESTS_UNTIL", "inf"))
    if time.time() > until and item.get_closest_marker("slow"):
        pytest.skip("NO TIME LEFT on this machine for this slow test")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not walk it in every test and every forked rank."""
    gc.collect()
    gc.freeze()
