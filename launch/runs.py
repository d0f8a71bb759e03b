"""What run directories say: metrics, events, state. Read by dash, report, study and status.

Only reads, needs no torch, and works on a run that is being written: `metrics.jsonl` is
append-only, except that a restart replaces it by a shorter file (`train.metrics.cut_back`).
"""

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, BinaryIO

from pydantic_core import from_json

Row = dict[str, Any]

FINAL_STEPS = 10
"""The final loss of a run is the mean over this many last steps: one step is too noisy."""

_RUN_FILES = ("recipe.yaml", "metrics.jsonl", "status.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One run in a line. Losses are next-token losses in nats per token, None if not logged."""

    name: str
    """Path below the runs directory with forward slashes, unique in it."""
    path: Path
    state: str
    """running, done, stopped or failed, as in status.json; "unknown" without that file."""
    step: int
    """Last optimizer step with a record; 0 before the first."""
    tokens: int
    first_loss: float | None
    last_loss: float | None
    final_loss: float | None
    """Mean over the last FINAL_STEPS steps."""
    validation_loss: float | None
    """Of the last evaluation."""
    tokens_per_second: float | None
    """Median over the steps, which leaves out a slow first step and hiccups."""


class JsonLines:
    """A growing file of JSON objects, one a line; every `poll` reads only what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.generation = uuid.uuid4().hex
        """Changes when lines read earlier are no longer in the file: the run was restarted from a
        checkpoint, and what a reader has kept is of an abandoned attempt."""
        self._offset = self._lines = 0
        self._last = b""

    def poll(self, on_restart: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """New objects, oldest first; none without a file. A half-written last line has to wait.

        Args:
            on_restart: called first where the file no longer continues what was read.

        Raises:
            ValueError: a finished line is not an object; names file and line.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            if self._offset:
                self._start_over()
                on_restart()
            return
        with file:
            if not self._continues(file):
                self._start_over()
                on_restart()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                row = _parse(line.rstrip(b"\n"), f"{self.path}:{self._lines + 1}")
                self._last, self._lines = line, self._lines + 1
                self._offset += len(line)
                yield row

    def _continues(self, file: BinaryIO) -> bool:
        """Whether the last line read stands where it stood; it holds timings, so it is unique."""
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last


def _parse(line: bytes, place: str) -> Row:
    try:
        row = from_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place}: not a JSON object: {line[:60]!r}; remove the line to go on without it"
        )
    return row


def read_metrics(run_dir: Path) -> list[Row]:
    """Records of `metrics.jsonl`, one per optimizer step, oldest first; none without a file.

    Raises:
        ValueError: a finished line is not a record; a half-written last one is left out.
    """
    return list(JsonLines(run_dir / "metrics.jsonl").poll())


def read_events(run_dir: Path) -> list[Row]:
    """Rows of `events.jsonl`: `{time, step, rank, event, detail}`; as `read_metrics`."""
    return list(JsonLines(run_dir / "events.jsonl").poll())


def read_status(run_dir: Path) -> Row:
    """`status.json` of a run, `{"state": "unknown"}` before it exists or while it is replaced."""
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {"state": "unknown"}
    return status if isinstance(status, dict) else {"state": "unknown"}


def find_runs(runs_dir: Path) -> dict[str, Path]:
    """Run directories by name, newest first: `runs_dir` itself, or what is one or two levels below.

    Two levels, because a study keeps its runs in a directory of its own.
    """
    if _is_run(runs_dir):
        return {runs_dir.resolve().name: runs_dir}
    found = sorted(_below(runs_dir, levels=2), key=_started, reverse=True)
    return {path.relative_to(runs_dir).as_posix(): path for path in found}


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _RUN_FILES)


def _below(directory: Path, levels: int) -> Iterator[Path]:
    for path in directory.iterdir():
        if not path.is_dir() or path.name.startswith("."):
            continue
        if _is_run(path):
            yield path
        elif levels > 1:
            yield from _below(path, levels - 1)


def _started(path: Path) -> float:
    """When the run was made: the launcher writes `recipe.yaml` once, before anything else."""
    recipe = path / "recipe.yaml"
    return (recipe if recipe.is_file() else path).stat().st_mtime


def summarize(name: str, path: Path, rows: list[Row]) -> RunSummary:
    """Boil a run down to a line; `rows` are its records."""
    losses = [loss for row in rows if (loss := next_token_loss(row)) is not None]
    validation = [row["validation/loss"] for row in rows if "validation/loss" in row]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    last = rows[-1] if rows else {}
    return RunSummary(
        name=name,
        path=path,
        state=str(read_status(path).get("state", "unknown")),
        step=int(last.get("step", 0)),
        tokens=int(last.get("tokens", 0)),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        final_loss=fmean(losses[-FINAL_STEPS:]) if losses else None,
        validation_loss=validation[-1] if validation else None,
        tokens_per_second=median(speeds) if speeds else None,
    )


def next_token_loss(row: Row) -> float | None:
    """Training loss that may be compared between models: without MTP and balance terms."""
    loss = row.get("loss_main", row.get("loss"))
    return None if loss is None else float(loss)
