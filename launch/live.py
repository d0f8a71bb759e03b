"""What a terminal shows while a run goes on: one panel, drawn again when something is new.

`launch.progress` feeds it. Everything comes from the run directory, as for any other reader.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.runs import JsonLines, Row, next_token_loss

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_MOST_LOSSES = 4000
_NUM_EVENTS = 3
_COLORS = {"alarm": "bold red", "skip": "yellow", "rollback": "yellow", "stop": "yellow"}
_QUIET = ("checkpoint", "skipped_sample")
"""Events that have a place of their own, or are too many."""

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def _compact(value: float) -> str:
    for unit, size in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


CELLS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "validation/loss": ("held-out loss", lambda v: f"{v:.4f}"),
    "grad_norm": ("grad norm", lambda v: f"{v:.3g}"),
    "learning_rate": ("learning rate", lambda v: f"{v:.2e}"),
    "tokens": ("tokens", _compact),
    "tokens_per_second": ("tokens/s", lambda v: f"{v:,.0f}"),
    "model_flops_utilization": ("MFU", lambda v: f"{v:.1%}"),
    "step_seconds": ("step", lambda v: f"{v:.3g} s"),
    "data_wait_seconds": ("data wait", lambda v: f"{v:.2g} s"),
    "peak_memory_bytes": ("memory", lambda v: f"{_compact(v)}B"),
    "mhc/composite_gain_forward": ("gain forward", lambda v: f"{v:,.4f}"),
    "mhc/composite_gain_backward": ("gain backward", lambda v: f"{v:,.4f}"),
    "moe/load_max_over_mean": ("expert load max/mean", lambda v: f"{v:.2f}"),
}
"""Metrics of the table, each with its name there and how it is written."""


@dataclass
class RunView:
    """What is known of a run, and how it looks."""

    run_dir: Path
    steps: int
    ranks: int
    latest: Row = field(default_factory=dict)
    """The newest value of every metric: not every record has all of them."""
    losses: "deque[float]" = field(default_factory=lambda: deque(maxlen=_MOST_LOSSES))
    alive: int | None = None
    """Ranks that run now; None before they have started."""
    left: str = ""
    """Time to the end, as text."""

    def __post_init__(self) -> None:
        self._file = JsonLines(self.run_dir / "events.jsonl")
        earlier = list(self._file.poll())
        self._past = len(earlier)
        self._events = earlier

    def poll_events(self) -> bool:
        """Read what happened since; whether something did."""
        new = list(self._file.poll(self._events.clear))
        self._events += new
        return bool(new)

    def add(self, record: Row) -> None:
        """Take the record of a step."""
        self.latest |= record
        loss = next_token_loss(record)
        if loss is not None:
            self.losses.append(loss)

    def panel(self, console: Console) -> Panel:
        """The panel, for a console that may or may not have block characters."""
        rows: list[RenderableType] = [self._bar(), self._loss(console), self._table(console.width)]
        rows += self._happened()
        alive = self.ranks if self.alive is None else self.alive
        ranks = Text(f"{alive}/{self.ranks} ranks", "green" if alive == self.ranks else "bold red")
        title = Text.assemble((self.run_dir.name, "bold"), "  ", ranks)
        return Panel(Group(*rows), title=title, title_align="left", border_style="dim")

    def _bar(self) -> RenderableType:
        step = int(self.latest.get("step", 0))
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=self.steps, completed=step)
        after = (
            f"{step / self.steps:.0%}  {self.left} left"
            if self.left
            else f"{step / self.steps:.0%}"
        )
        grid.add_row(Text.assemble("step ", (f"{step}/{self.steps}", "bold")), bar, after)
        return grid

    def _loss(self, console: Console) -> RenderableType:
        loss = next_token_loss(self.latest)
        said = "waiting for the first step" if loss is None else f"{loss:.4f}"
        blocks = console.encoding.startswith("utf")
        line = sparkline(list(self.losses)) if blocks else ""
        return Text.assemble("loss ", (said, "bold"), "  ", (line, "cyan"))

    def _table(self, width: int) -> RenderableType:
        pairs = [
            (name, write(float(self.latest[metric])))
            for metric, (name, write) in CELLS.items()
            if metric in self.latest
        ]
        columns = 4 if width >= 110 else 3 if width >= 84 else 2
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="right", no_wrap=True, min_width=9)
        for start in range(0, len(pairs), columns):
            grid.add_row(*(cell for pair in pairs[start : start + columns] for cell in pair))
        return grid

    def _happened(self) -> list[Text]:
        new = self._events[self._past :]
        saved = [event for event in new if event["event"] == "checkpoint"]
        rows = [Text(f"checkpoint {saved[-1]['detail']}", "dim")] if saved else []
        for event in [e for e in new if e["event"] not in _QUIET][-_NUM_EVENTS:]:
            text = f"{event['event']} at step {event['step']}: {event['detail']}"
            rows.append(
                Text(text, _COLORS.get(event["event"], ""), no_wrap=True, overflow="ellipsis")
            )
        return rows


def sparkline(values: list[float], width: int = _SPARK_WIDTH) -> str:
    """Values as a line of bars, means of as many as fall into a column; gaps where none is finite."""
    finite = [value for value in values if abs(value) < float("inf")]
    if len(finite) < 2:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    columns = []
    for start, end in pairwise(edges):
        known = [value for value in values[start:end] if abs(value) < float("inf")]
        columns.append(sum(known) / len(known) if known else None)
    heights = [value for value in columns if value is not None]
    low, span = min(heights), (max(heights) - min(heights)) or 1.0
    top = len(_BARS) - 1
    return "".join(
        " " if value is None else _BARS[round((value - low) / span * top)] for value in columns
    )


def ranks_alive(pids: Mapping[str, Any]) -> int:
    """How many of these processes run; {rank: process id}."""
    import psutil  # noqa: PLC0415 - only a terminal shows it

    alive = 0
    for pid in pids.values():
        try:
            alive += psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
    return alive
