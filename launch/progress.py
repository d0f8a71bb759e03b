"""How far a run is, on the screen of whoever started it, from what the ranks write.

`launch.local` keeps it open while the ranks run. In a terminal a panel (`launch.live`) is redrawn;
elsewhere (a file, a pipe, CI) a plain line is printed now and then.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from tqdm import tqdm

from launch.live import RunView, ranks_alive
from launch.run_dir import last_attempt_logs, last_record
from launch.runs import next_token_loss

_POLL_SECONDS = 0.2
_PLAIN_LINE_SECONDS = 10.0
_ALIVE_SECONDS = 2.0


class ProgressLine:
    """A context manager; a thread follows the run directory while it is open."""

    def __init__(self, run_dir: Path, *, steps: int, first_step: int, ranks: int) -> None:
        self._run_dir = run_dir
        self._steps = steps
        self._ranks = ranks
        self._stale = last_record(run_dir)
        """The end of an earlier attempt, until this one writes."""
        self._shown = first_step
        self._first_seen: tuple[int, float] | None = None
        """Step of the first record and when it came: what went before is start-up, not training."""
        self._next_line = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._view = RunView(run_dir, steps, ranks, latest={"step": first_step})
        self._next_count = 0.0
        self._live: Live | None = None

    def __enter__(self) -> "ProgressLine":
        self.say(f"starting {self._ranks} rank{'s' if self._ranks > 1 else ''} ...")
        console = Console(file=sys.stdout)
        if _is_sized_terminal() and not console.is_dumb_terminal:
            self._live = Live(
                self._view.panel(console),
                console=console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._update(last=True)
        if self._live is not None:
            self._redraw(self._live)
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line without tearing what is shown."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _follow(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._update()

    def _update(self, *, last: bool = False) -> None:
        record = last_record(self._run_dir)
        is_new = record is not None and record != self._stale and record["step"] != self._shown
        if self._live is not None:
            happened = self._view.poll_events()
            if is_new or happened or self._count_ranks():
                self._take(record if is_new else None)
                self._redraw(self._live)
        elif is_new and (last or time.monotonic() >= self._next_line):
            self._take(record)
            self._next_line = time.monotonic() + _PLAIN_LINE_SECONDS
            self.say(self._plain_line(self._view.latest))

    def _take(self, record: dict[str, Any] | None) -> None:
        if record is None:
            return
        self._first_seen = self._first_seen or (record["step"], time.monotonic())
        self._shown = record["step"]
        self._view.add(record)
        self._view.left = self._left(record)

    def _redraw(self, live: Live) -> None:
        live.update(self._view.panel(live.console), refresh=True)

    def _count_ranks(self) -> bool:
        """Look now and then which ranks run; whether that has changed."""
        if time.monotonic() < self._next_count or self._done.is_set():
            return False
        self._next_count = time.monotonic() + _ALIVE_SECONDS
        before, self._view.alive = self._view.alive, _alive(self._run_dir)
        return before != self._view.alive

    def _left(self, record: dict[str, Any]) -> str:
        step = record["step"]
        first, since = self._first_seen or (step, 0.0)
        seconds = record.get("step_seconds", 0.0)
        if step > first:
            seconds = (time.monotonic() - since) / (step - first)
        return str(tqdm.format_interval(seconds * (self._steps - step)))

    def _plain_line(self, record: dict[str, Any]) -> str:
        return f"step {record['step']}/{self._steps}  {_numbers(record)}  {self._left(record)} left"


def _alive(run_dir: Path) -> int | None:
    """Ranks of the newest attempt that run; None before they are known."""
    logs = last_attempt_logs(run_dir)
    try:
        pids = json.loads((logs / "pids.json").read_text(encoding="utf-8")) if logs else None
    except (FileNotFoundError, ValueError):
        return None
    return None if pids is None else ranks_alive(pids)


def _is_sized_terminal() -> bool:
    """Whether stdout is a terminal with a size; in a container it may have none: no panel then."""
    return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 1


def _numbers(record: dict[str, Any]) -> str:
    speed = record.get("tokens_per_second")
    loss = next_token_loss(record)
    words = [
        "" if loss is None else f"loss {loss:.4f}",
        "" if speed is None else f"{speed:,.0f} tokens/s",
    ]
    return "  ".join(word for word in words if word)
