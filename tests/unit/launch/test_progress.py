import json
import os
import pty
import re
import select
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.progress import ProgressLine


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


@pytest.mark.parametrize("rows", [24, 0])
def test_a_terminal_gets_one_bar_if_it_has_a_size(
    line: Callable[..., ProgressLine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
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
    assert "loss 0.9000  1,244 tokens/s" in out
    if rows:
        assert out.rstrip().rpartition("\r")[2].startswith("100%|")
        assert "10/10" in out
    else:
        assert "step 10/10  loss 0.9000" in out
