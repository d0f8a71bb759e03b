"""What the runs of a study cost, kept beside each of them in `cost.jsonl`: a line for each attempt."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = "cost.jsonl"


@contextmanager
def measured(run_dir: Path) -> Iterator[None]:
    """Note the wall time and the CPU time of the children that end in here, and of theirs."""
    started, before = time.monotonic(), _children()
    try:
        yield
    finally:
        if run_dir.is_dir():  # else nothing was begun
            cost = {"seconds": time.monotonic() - started, "cpu_seconds": _children() - before}
            with (run_dir / _NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(cost) + "\n")


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(run_dir: Path) -> float | None:
    """CPU time of all attempts of a run; None if it was not noted."""
    return _total(run_dir, "cpu_seconds")


def seconds(run_dir: Path) -> float | None:
    """Wall time of all attempts of a run; None if it was not noted."""
    return _total(run_dir, "seconds")


def _total(run_dir: Path, name: str) -> float | None:
    path = run_dir / _NAME
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return float(sum(json.loads(line)[name] for line in lines))
