"""One run as columns of numbers, and pieces of them for the page: at most so many points a curve.

Called by `launch.dash.server`. A poll reads only what was added to `metrics.jsonl`. Curves are cut
into buckets of 2^level records, of which the page gets mean, minimum and maximum: no spike is lost,
and buckets that are complete never change, so the page asks for what comes after them.
"""

import re
import time
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.runs import JsonLines, Row

AXES = ("step", "tokens", "time")
SITE = re.compile(r"(.+)/site_(\d+)/(.+)")
"""Metrics of one place of the network: group, place, name."""

_POLL_SECONDS = 0.5
"""A poll reads no longer than this: a long run arrives in pieces, and the page stays alive."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the page wants of a curve."""

    metric: str
    level: int | None = None
    """Of the buckets; None: so that there are at most `points`."""
    after: int = 0
    """First record of the metric that is wanted, by its number; a multiple of the bucket."""
    points: int = 1000
    window: tuple[float, float] | None = None
    """Range of the horizontal axis; None: all of it."""


@dataclass
class Column:
    """A metric: the records that have it, and its values there."""

    records: "array[int]" = field(default_factory=lambda: array("I"))
    values: "array[float]" = field(default_factory=lambda: array("d"))


class RunTable:
    """The records of a run, read as far as the last poll."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._events = JsonLines(run_dir / "events.jsonl")
        self.events: list[Row] = []
        self._forget()

    def _forget(self) -> None:
        self.columns: defaultdict[str, Column] = defaultdict(Column)
        self.last: Row = {}
        self._axes: dict[str, array[float]] = {axis: array("d") for axis in AXES}

    @property
    def generation(self) -> str:
        """See `JsonLines.generation`."""
        return self._metrics.generation

    def poll(self) -> bool:
        """Read what is new; whether that was all of it.

        Raises:
            ValueError: a line is not a record.
        """
        events = list(self._events.poll(self.events.clear))
        self.events += events
        end = time.monotonic() + _POLL_SECONDS
        for row in self._metrics.poll(self._forget):
            self._add(row)
            if time.monotonic() > end:
                return False
        return True

    def _add(self, row: Row) -> None:
        number, seconds = len(self._axes["step"]), self._axes["time"]
        for name, value in row.items():
            if isinstance(value, int | float):
                column = self.columns[name]
                column.records.append(number)
                column.values.append(value)
        self._axes["step"].append(row["step"])
        self._axes["tokens"].append(row.get("tokens", 0))
        # What lies between two records of a run that stood still is not in its time.
        seconds.append((seconds[-1] if seconds else 0.0) + row.get("step_seconds", 0.0))
        self.last = row

    def names(self) -> list[str]:
        """Metrics that have a curve of their own: those by site have heat maps."""
        return [name for name in self.columns if not SITE.fullmatch(name)]

    def sites(self) -> dict[str, list[str]]:
        """Quantity -> metrics of all sites, in their order."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.columns):
            if match := SITE.fullmatch(name):
                found.setdefault(f"{match[1]}/{match[3]}", []).append(name)
        return found

    def place(self, step: int) -> dict[str, float]:
        """Where a step lies on each axis; for one that has no record yet, the last one that has."""
        steps = np.frombuffer(self._axes["step"])
        if not len(steps):
            return dict.fromkeys(AXES, 0.0) | {"step": step}
        number = min(int(np.searchsorted(steps, step)), len(steps) - 1)
        return {axis: values[number] for axis, values in self._axes.items()} | {"step": step}

    def values(self, metric: str, axis: str) -> tuple[Numbers, Numbers]:
        """All of a metric: positions on the axis, values."""
        column = self.columns.get(metric, Column())
        records = np.array(column.records, dtype=np.int64)
        return np.array(self._axes[axis])[records], np.array(column.values)

    def curve(self, ask: Ask, axis: str) -> dict[str, Any]:
        """Buckets of a metric along an axis.

        Returns:
            `{level, first, end}`: records first..end (exclusive) of the metric in buckets of
            2^level; `{x, mean}`: of each bucket, x that of its last record; and if level > 0
            `{low, high, count}` of its finite values, None where it has none.
        """
        x, values = self.values(ask.metric, axis)
        first, end = ask.after, len(values)
        if ask.window is not None:
            low, high = ask.window
            first = max(first, int(np.searchsorted(x, low)) - 1)
            end = min(end, int(np.searchsorted(x, high, side="right")) + 1)
        level = _level(end - first, ask.points) if ask.level is None else ask.level
        first = max(0, first) >> level << level
        answer = {"level": level, "first": first, "end": max(first, end)}
        return answer | buckets(x[first:end], values[first:end], 1 << level)


def _level(records: int, points: int) -> int:
    """The finest buckets of which there are at most so many."""
    level = 0
    while records > points << level:
        level += 1
    return level


def buckets(x: Numbers, values: Numbers, size: int) -> dict[str, Any]:
    """Mean, extremes and number of finite values of every `size` values; see `RunTable.curve`."""
    starts = np.arange(0, len(values), size)
    if not len(starts):
        return {"x": [], "mean": []} | ({"low": [], "high": [], "count": []} if size > 1 else {})
    ends = np.minimum(starts + size, len(values))
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    answer = {"x": x[ends - 1].tolist(), "mean": plain(mean)}
    if size > 1:
        low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
        high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        answer |= {"low": plain(low), "high": plain(high), "count": count.tolist()}
    return answer


def plain(values: Numbers | Sequence[float]) -> list[float | None]:
    """For JSON, which has no NaN and no infinity: None, where the page draws a gap."""
    return [value if np.isfinite(value) else None for value in np.asarray(values).tolist()]
