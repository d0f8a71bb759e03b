import io
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.live import RunView, ranks_alive, sparkline
from launch.progress import ProgressLine
from train.events import append_event


def write(run_dir: Path, *steps: int) -> None:
    rows = [{"step": s, "loss": 9 / s, "tokens_per_second": 1234.5 + s} for s in steps]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text)


@pytest.fixture
def line(tmp_path: Path) -> Callable[..., ProgressLine]:
    def make(**options: Any) -> ProgressLine:
        return ProgressLine(tmp_path, steps=10, **{"first_step": 0, "ranks": 4} | options)

    return make


def test_plain_lines_say_where_the_run_is(
    line: Callable[..., ProgressLine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with line():
        time.sleep(0.3)
        assert capsys.readouterr().out == "starting 4 ranks ...\n"
        write(tmp_path, 1)
        time.sleep(0.5)
        first = capsys.readouterr().out
        write(tmp_path, 1, 2, 3)
        time.sleep(0.3)
        assert capsys.readouterr().out == ""  # a line in ten seconds
    assert first.startswith("step 1/10  loss 9.0000  1,236 tokens/s  ")
    assert re.search(r"  \d\d:\d\d left\n$", first)
    assert capsys.readouterr().out.startswith("step 3/10  loss 3.0000")


def test_records_of_an_earlier_attempt_are_not_shown(
    line: Callable[..., ProgressLine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    with line(first_step=5, ranks=1):
        time.sleep(0.3)
        write(tmp_path, 1, 2, 3, 4, 5)  # cut back to the checkpoint
        time.sleep(0.3)
        assert capsys.readouterr().out == "starting 1 rank ...\n"
        write(tmp_path, 1, 2, 3, 4, 5, 6)
    assert capsys.readouterr().out.startswith("step 6/10")


def read_all(terminal: int) -> str:
    """What was written to a terminal; the kernel hands it over in pieces, a little later."""
    pieces = []
    while select.select([terminal], [], [], 0.5)[0]:
        pieces.append(os.read(terminal, 100_000))
    return b"".join(pieces).decode()


@pytest.mark.parametrize("rows", [40, 0])
def test_a_terminal_gets_a_panel_if_it_has_a_size(
    line: Callable[..., ProgressLine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, 100))
    with open(theirs, "w", encoding="utf-8") as terminal:  # noqa: PTH123 - a descriptor
        monkeypatch.setattr("sys.stdout", terminal)
        with line() as shown:
            write(tmp_path, 1, 2, 3, 4)
            time.sleep(0.4)
            shown.say("a word")
            write(tmp_path, *range(1, 11))
        monkeypatch.undo()
        out = read_all(ours)
    os.close(ours)
    assert "a word\r\n" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    if rows:
        end = plain[plain.rindex("\u256d") :]  # the last panel, from its upper corner
        assert "step 10/10" in end
        assert "100%" in end
        assert "0.9000" in end
        assert re.search(r"tokens/s +1,244", end)
        assert "\x1b[?25h" in out  # the cursor is back
    else:
        assert "step 10/10  loss 0.9000  1,244 tokens/s" in plain
        assert "\x1b" not in out


def screen(view: RunView, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(view.panel(console))
    return console.export_text()


def test_the_panel_tells_what_matters(tmp_path: Path) -> None:
    append_event(tmp_path, step=0, rank=0, event="start", detail="of an earlier attempt")
    view = RunView(tmp_path, steps=200, ranks=4)
    assert "waiting for the first step" in screen(view)
    for step in range(1, 51):
        view.add({"step": step, "loss_main": 5 / step, "grad_norm": 1.25, "learning_rate": 1e-3})
    view.add({"step": 50, "mhc/composite_gain_forward": 1.0004, "moe/load_max_over_mean": 1.5})
    view.add({"step": 51, "peak_memory_bytes": 61e9, "model_flops_utilization": 0.4321})
    append_event(tmp_path, step=40, rank=0, event="checkpoint", detail="step-00000040")
    append_event(tmp_path, step=45, rank=0, event="alarm", detail="spike: loss = 9, above 5")
    assert view.poll_events()
    assert not view.poll_events()
    view.alive, view.left = 3, "01:30"
    text = screen(view)
    for word in (
        *("step 51/200", "26%  01:30 left", "3/4 ranks", "loss 0.1000", "43.2%", "61 GB"),
        *("gain forward", "checkpoint step-00000040"),
        *("alarm at step 45: spike: loss = 9, above 5", "1.00e-03", "1.25", "1.50"),
    ):
        assert word in text, word
    assert "earlier attempt" not in text
    assert "\u2588" in text  # a bar of the curve
    for width in (60, 90, 140):
        assert max(map(len, screen(view, width).splitlines())) <= width


def test_a_curve_in_a_line_keeps_the_shape_and_the_gaps() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "\u2588\u2585\u2581"
    assert sparkline([1.0, math.nan, 2.0]) == "\u2581 \u2588"
    assert len(sparkline([float(i) for i in range(1000)], 40)) == 40
    assert sparkline([1.0]) == sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "\u2581\u2581"


def test_ranks_are_counted_by_their_processes() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert ranks_alive({"0": os.getpid(), "1": gone.pid}) == 1
