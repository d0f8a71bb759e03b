"""`mneme doctor`: what it takes, the order of its rows, and how they are shown.

Nothing here imports torch, which may be what is broken: children of this process do.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.doctor.row import Row

_MARKS = {True: ("ok", "32"), False: ("FAIL", "31"), None: ("-", "33")}
"""What a row begins with, and the terminal's number for its colour: green, red, yellow."""


def add_doctor_options(command: argparse.ArgumentParser) -> None:
    """Declare its options."""
    command.add_argument("--backend", default="auto", help="to check (default: as `auto` finds it)")
    command.add_argument("--nproc", type=int, default=2, help="ranks of the suite (default: 2)")
    command.add_argument("--json", action="store_true", help="answer as one JSON object")


def run_doctor(options: argparse.Namespace) -> int:
    """Check everything; 0 if nothing is red, else 1.

    Raises:
        ValueError: there is no such backend, or no rank.
    """
    if options.nproc < 1:
        raise ValueError(f"--nproc {options.nproc}: must be positive; use --nproc 2")
    found = []
    for row in _rows(options.backend, options.nproc):
        found.append(row)
        if not options.json:
            _print(row)
    ok = all(row.ok is not False for row in found)
    if options.json:
        print(json.dumps({"ok": ok, "checks": [asdict(row) for row in found]}, indent=2))
    else:
        _summarise(found)
    return 0 if ok else 1


def _rows(backend: str, nproc: int) -> Iterator["Row"]:
    from launch.doctor import conformance, environment, installed  # noqa: PLC0415
    from launch.doctor.backends import probe_torch  # noqa: PLC0415

    yield from environment.rows()
    yield from installed.rows()
    probe = probe_torch(backend)
    yield from probe.rows
    if probe.chosen is not None:
        yield from conformance.rows(probe.chosen, nproc)


def _print(row: "Row") -> None:
    word, colour = _MARKS[row.ok]
    mark = f"{word:<4}"
    if sys.stdout.isatty():
        mark = f"\033[{colour}m{mark}\033[0m"
    print(f"{mark}  {row.name:<28} {row.found}".rstrip(), flush=True)
    for text in (row.problem, row.fix and f"fix: {row.fix}"):
        for line in (text or "").splitlines():
            print(f"        {line}", flush=True)


def _summarise(rows: list["Row"]) -> None:
    red = [row.name for row in rows if row.ok is False]
    if red:
        print(f"\n{len(red)} of {len(rows)} checks failed: {', '.join(red)}")
    else:
        print(f"\nall is well: {sum(row.ok is True for row in rows)} checks")
