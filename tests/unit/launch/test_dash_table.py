import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.dash.heat import LOAD, Loads, sites
from launch.dash.table import Ask, RunTable, buckets
from train.events import append_event
from train.expert_load import encode
from train.metrics import cut_back


def write(run_dir: Path, steps: range, **more: float) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "tokens": 8 * step, "loss": 5 / step, "step_seconds": 0.5} | more
            file.write(json.dumps(row) + "\n")


def read(run_dir: Path) -> RunTable:
    table = RunTable(run_dir)
    assert table.poll()
    return table


def test_a_short_curve_is_sent_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    table = read(tmp_path)
    curve = table.curve(Ask(metric="loss"), "tokens")
    assert curve == {
        "level": 0,
        "first": 0,
        "end": 4,
        "x": [8, 16, 24, 32],
        "mean": [5, 2.5, 5 / 3, 1.25],
    }
    assert table.curve(Ask(metric="loss"), "time")["x"] == [0.5, 1.0, 1.5, 2.0]
    assert table.curve(Ask(metric="nope"), "step")["x"] == []


def test_buckets_keep_mean_and_extremes() -> None:
    values = np.array([1.0, 9.0, 2.0, math.nan, math.inf, math.nan, 4.0])
    found = buckets(np.arange(7.0), values, 2)
    assert found == {
        "x": [1, 3, 5, 6],
        "mean": [5, 2, None, 4],
        "low": [1, 2, None, 4],
        "high": [9, 2, None, 4],
        "count": [2, 1, 0, 1],
    }


@pytest.mark.parametrize("records", [100, 101, 127, 128, 1000])
def test_pieces_that_are_asked_for_one_by_one_make_the_whole_curve(
    tmp_path: Path, records: int
) -> None:
    """As the page does: the last bucket again, and what comes after it."""
    write(tmp_path, range(1, 65))
    table = read(tmp_path)
    curve = table.curve(Ask(metric="loss", points=20), "step")
    assert (curve["level"], len(curve["x"])) == (2, 16)
    columns = {name: curve[name] for name in ("x", "mean", "low", "high", "count")}
    for start in range(65, records + 1, 7):
        write(tmp_path, range(start, min(start + 7, records + 1)))
        table.poll()
        last = len(columns["x"]) - 1
        piece = table.curve(Ask(metric="loss", level=2, after=last << 2), "step")
        assert piece["first"] == last << 2
        assert len(piece["x"]) <= 3
        for name, values in columns.items():
            values[last:] = piece[name]
    whole = table.curve(Ask(metric="loss", level=2), "step")
    assert columns == {name: whole[name] for name in columns}
    assert sum(whole["count"]) == records


def test_a_window_is_finer_and_reaches_beyond_its_ends(tmp_path: Path) -> None:
    write(tmp_path, range(1, 1001))
    curve = read(tmp_path).curve(Ask(metric="loss", points=50, window=(500, 520)), "step")
    assert curve["level"] == 0
    assert (curve["x"][0], curve["x"][-1]) == (499, 521)


def test_a_metric_of_some_records_has_its_own_places(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(10, 11), gain=3.0)
    write(tmp_path, range(11, 21))
    write(tmp_path, range(21, 22), gain=4.0)
    curve = read(tmp_path).curve(Ask(metric="gain"), "tokens")
    assert (curve["x"], curve["mean"]) == ([80, 168], [3, 4])


def test_a_restart_starts_the_table_over(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    append_event(tmp_path, step=5, rank=0, event="checkpoint", detail="")
    table = read(tmp_path)
    before = table.generation
    cut_back(tmp_path / "metrics.jsonl", 3)
    write(tmp_path, range(4, 5), step_seconds=9.0)
    append_event(tmp_path, step=3, rank=0, event="resume", detail="")
    table.poll()
    assert table.generation != before
    assert table.curve(Ask(metric="loss"), "time")["x"] == [0.5, 1.0, 1.5, 10.5]
    assert [event["event"] for event in table.events] == ["checkpoint", "resume"]
    assert table.place(3) == {"step": 3, "tokens": 24, "time": 1.5}
    assert table.place(99)["tokens"] == 32


def test_a_poll_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 2001))
    table = read(tmp_path)
    parsed: list[bytes] = []

    def parse(line: bytes) -> Any:
        parsed.append(line)
        return json.loads(line)

    monkeypatch.setattr("launch.runs.from_json", parse)
    table.poll()
    assert parsed == []
    write(tmp_path, range(2001, 2004))
    table.poll()
    assert len(parsed) == 3


def test_a_long_run_arrives_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 101))
    monkeypatch.setattr("launch.dash.table._POLL_SECONDS", 0.0)
    table, polls = RunTable(tmp_path), 1
    while not table.poll():
        polls += 1
    assert polls > 2
    assert len(table.values("loss", "step")[0]) == 100


def test_gains_by_site_become_a_map(tmp_path: Path) -> None:
    for step in range(10, 4010, 10):
        gains = {f"mhc/site_{site:03d}/gain_forward": site + step / 1000 for site in range(3)}
        write(tmp_path, range(step, step + 1), **gains)
    table = read(tmp_path)
    assert [name for name in table.names() if "site" in name] == []
    heat = sites(table, "mhc/gain_forward")
    assert heat is not None
    assert heat.values.shape == (3, 200)
    assert heat.places[:2] == [20, 40]
    assert heat.values[2, -1] == pytest.approx(6.0)  # the larger of the last two
    assert sites(table, "mhc/nothing") is None


def test_loads_are_layers_by_experts_or_experts_by_steps(tmp_path: Path) -> None:
    with (tmp_path / "expert_load.jsonl").open("w") as file:
        for step in (20, 40, 60):
            counts = np.array([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0 + step]])
            file.write(json.dumps(encode(step, counts)) + "\n")
    loads = Loads(tmp_path)
    loads.poll()
    latest = loads.latest()
    assert (latest.kind, loads.layers(), latest.values.shape) == (LOAD, 2, (2, 3))
    assert latest.values[0] == pytest.approx([0.5, 1.5, 1.0])
    assert "60" in latest.columns
    over_steps = loads.of_layer(1)
    assert (over_steps.places, over_steps.values.shape) == ([20, 40, 60], (3, 3))
    assert over_steps.values[2] == pytest.approx([24 / (32 / 3), 44 / (52 / 3), 64 / 24], abs=0.005)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ten_long_runs_stay_usable(tmp_path: Path) -> None:
    """A poll of a run of 100,000 steps that has been read is quick, whatever its length."""
    metrics = {f"group/metric_{i}": 0.123456789 * i for i in range(25)}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(
                json.dumps({"step": step, "tokens": step, "loss": 1 / step} | metrics) + "\n"
            )
    table = RunTable(tmp_path)
    while not table.poll():
        pass
    ask = Ask(metric="loss", points=1200)
    started = time.process_time()
    for _ in range(10):
        table.poll()
        curve = table.curve(ask, "step")
    assert (time.process_time() - started) / 10 < 0.1  # ten runs: a second
    assert len(curve["x"]) <= 1200
    assert sum(curve["count"]) == 100_000
