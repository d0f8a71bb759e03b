"""`mneme bench NAME`: run a benchmark of the checkout and print its rows.

A benchmark is `tests/benchmarks/NAME.py` with a function `run() -> list[Row]`.
"""

import importlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "tests" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, beside that of what a user would pick instead."""

    case: str
    """What was measured, and the peer's name if there is one."""
    value: float
    unit: str
    peer: float | None = None
    """The peer's figure in the same unit, from the same run of the benchmark."""
    ratio: float | None = None
    """`value / peer`."""
    target: float | None = None
    """The promised bound on the value; a benchmark that promises a ratio says so in `case`."""
    met: bool | None = None
    """Whether the promise is kept."""


class BenchmarkError(ValueError):
    """There is no such benchmark."""


def bench(name: str, *, as_json: bool) -> int:
    """Run a benchmark and print it; returns 0, also if a target was missed: the rows say so.

    Raises:
        BenchmarkError: there is no benchmark of that name here.
    """
    rows = _load(name)()
    if as_json:
        answer = {
            "name": name,
            "command": f"mneme bench {name}",
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(answer, indent=2))
    else:
        print(f"{name} on {machine()}")
        print_table(rows)
    return 0


def names() -> list[str]:
    """The benchmarks of this checkout; none in an installed package."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


def machine() -> str:
    """This machine in a line."""
    cores = os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return f"{system}, {cores} cores, Python {platform.python_version()}, torch {version('torch')}"


def print_table(rows: list[Row]) -> None:
    """Print rows in aligned columns, absent fields as a dash."""
    table = [["case", "value", "unit", "peer", "ratio", "target", "met"]]
    table += [[_cell(value) for value in asdict(row).values()] for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _load(name: str) -> Callable[[], list[Row]]:
    known = names()
    if not known:
        raise BenchmarkError(f"bench {name}: benchmarks are in the source checkout, not installed")
    if name not in known:
        nearest = ", ".join(get_close_matches(name, known) or known)
        raise BenchmarkError(f"bench {name}: no such benchmark; use {nearest}")
    run: Callable[[], list[Row]] = importlib.import_module(f"tests.benchmarks.{name}").run
    return run


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
