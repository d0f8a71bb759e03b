"""One line that shows how far a run is, from the records that rank 0 writes.

`launch.local` keeps it on screen while the ranks run. In a terminal the line is redrawn; elsewhere
(a file, a pipe, CI) a plain line is printed now and then.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from launch.run_dir import last_record
from launch.runs import next_token_loss

_POLL_SECONDS = 0.2
_PLAIN_LINE_SECONDS = 10.0


class ProgressLine:
    """A context manager; a thread follows `metrics.jsonl` while it is open."""

    def __init__(self, run_dir: Path, *, steps: int, first_step: int, ranks: int) -> None:
        self._run_dir = run_dir
        self._steps = steps
        self._first_step = first_step
        self._ranks = ranks
        self._stale = last_record(run_dir)
        """The end of an earlier attempt, until this one writes."""
        self._shown = first_step
        self._first_seen: tuple[int, float] | None = None
        """Step of the first record and when it came: what went before is start-up, not training."""
        self._next_line = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> "ProgressLine":
        self.say(f"starting {self._ranks} rank{'s' if self._ranks > 1 else ''} ...")
        if _is_sized_terminal():
            self._bar = tqdm(
                total=self._steps,
                initial=self._first_step,
                unit="step",
                dynamic_ncols=True,
                file=sys.stdout,
            )
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
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """Print a line without tearing the progress line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def _follow(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._update()

    def _update(self, *, last: bool = False) -> None:
        record = last_record(self._run_dir)
        if record is None or record == self._stale or record["step"] == self._shown:
            return
        self._first_seen = self._first_seen or (record["step"], time.monotonic())
        if self._bar is not None:
            self._redraw(self._bar, record)
        elif last or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _PLAIN_LINE_SECONDS
            self.say(self._plain_line(record))
        else:
            return
        self._shown = record["step"]

    def _redraw(self, bar: "tqdm[Any]", record: dict[str, Any]) -> None:
        bar.set_postfix_str(_numbers(record), refresh=False)
        bar.update(record["step"] - bar.n)

    def _plain_line(self, record: dict[str, Any]) -> str:
        step = record["step"]
        first, since = self._first_seen or (step, 0.0)
        seconds = record.get("step_seconds", 0.0)
        if step > first:
            seconds = (time.monotonic() - since) / (step - first)
        left = seconds * (self._steps - step)
        return f"step {step}/{self._steps}  {_numbers(record)}  {tqdm.format_interval(left)} left"


def _is_sized_terminal() -> bool:
    """Whether stdout is a terminal with a size; in a container it may have none: no bar then."""
    return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 1


def _numbers(record: dict[str, Any]) -> str:
    speed = record.get("tokens_per_second")
    loss = next_token_loss(record)
    words = [
        "" if loss is None else f"loss {loss:.4f}",
        "" if speed is None else f"{speed:,.0f} tokens/s",
    ]
    return "  ".join(word for word in words if word)
