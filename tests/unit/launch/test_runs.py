import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from launch.runs import JsonLines, find_runs, read_events, read_metrics, read_status, summarize
from train.events import append_event
from train.metrics import cut_back


def append(run_dir: Path, steps: Iterable[int], **extra: float) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "tokens": 10 * step, "loss": 1.5 / step, "loss_main": 1 / step}
            file.write(json.dumps(row | extra) + "\n")


def steps(rows: list[dict[str, float]]) -> list[float]:
    return [row["step"] for row in rows]


def test_a_half_written_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    append(tmp_path, [1, 2])
    file = JsonLines(tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as writer:
        writer.write('{"step": 3, "loss"')
        writer.flush()
        assert steps(list(file.poll())) == steps(read_metrics(tmp_path)) == [1, 2]
        writer.write(": 0.25}\n")
        writer.flush()
        assert list(file.poll()) == read_metrics(tmp_path)[2:] == [{"step": 3, "loss": 0.25}]


def test_a_restart_is_noticed_even_when_the_new_attempt_is_already_further(tmp_path: Path) -> None:
    append(tmp_path, range(1, 6), attempt=1)
    file, restarts = JsonLines(tmp_path / "metrics.jsonl"), list[int]()
    before = (list(file.poll()), file.generation)[1]
    append(tmp_path, [6], attempt=1)
    assert steps(list(file.poll(lambda: restarts.append(1)))) == [6]
    assert file.generation == before
    assert restarts == []

    cut_back(tmp_path / "metrics.jsonl", 3)
    append(tmp_path, range(4, 9), attempt=2)
    rows = list(file.poll(lambda: restarts.append(2)))
    assert restarts == [2]
    assert [(row["step"], row["attempt"]) for row in rows] == [
        *((step, 1) for step in range(1, 4)),
        *((step, 2) for step in range(4, 9)),
    ]
    assert file.generation != before


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_events(tmp_path) == []
    assert read_status(tmp_path) == {"state": "unknown"}


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    append(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("[3]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object: b'\[3\]'"):
        read_metrics(tmp_path)


def test_events_are_those_that_the_trainer_wrote(tmp_path: Path) -> None:
    append_event(tmp_path, step=3, rank=0, event="checkpoint", detail="step-00000003")
    (event,) = read_events(tmp_path)
    assert (event["step"], event["event"]) == (3, "checkpoint")


def test_runs_are_found_newest_first_also_inside_a_study(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "study-x/on-seed0", "old"]):
        append(tmp_path / name, [1])
        (tmp_path / name / "recipe.yaml").write_text("name: x\n")
        os.utime(tmp_path / name / "recipe.yaml", (1000 - age, 1000 - age))
    append(tmp_path / "new" / "checkpoints", [1])
    append(tmp_path / "too/far/down", [1])
    (tmp_path / "study-x" / "report").mkdir()
    assert list(find_runs(tmp_path)) == ["new", "study-x/on-seed0", "old"]
    assert find_runs(tmp_path / "old") == {"old": tmp_path / "old"}


def test_a_summary_compares_next_token_losses(tmp_path: Path) -> None:
    append(tmp_path, range(1, 21), tokens_per_second=7.0)
    append(tmp_path, [21], **{"validation/loss": 0.5, "tokens_per_second": 1000.0})
    (tmp_path / "status.json").write_text('{"state": "done", "step": 21}')
    summary = summarize("x", tmp_path, read_metrics(tmp_path))
    assert (summary.state, summary.step, summary.tokens) == ("done", 21, 210)
    assert (summary.first_loss, summary.last_loss) == (1.0, 1 / 21)
    assert summary.final_loss == pytest.approx(sum(1 / step for step in range(12, 22)) / 10)
    assert (summary.validation_loss, summary.tokens_per_second) == (0.5, 7.0)


def test_a_run_without_records_has_a_summary_too(tmp_path: Path) -> None:
    summary = summarize("x", tmp_path, [])
    assert (summary.state, summary.step, summary.final_loss) == ("unknown", 0, None)
