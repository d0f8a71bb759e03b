"""Alarms of a run: all ranks save or stop after the step that raised one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.backend.cpu import CpuBackend
from tests.distributed.test_stages import recipe
from tests.harness import run_distributed
from train.config import AlarmAction, AlarmConfig, RunConfig
from train.loop import train
from train.stop import StopRequest


def with_alarm(corpus: Path, action: AlarmAction, metric: str = "loss") -> RunConfig:
    config = recipe(corpus, 2)
    rule = AlarmConfig(metric=metric, above=0.0, records=2, action=action)
    return replace(
        config,
        train=replace(config.train, steps=13),
        monitor=replace(config.monitor, alarms={"loss": rule}),
    )


def train_rank(rank: int, config: RunConfig, run_dir: Path) -> int:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return train(config, run_dir, StopRequest())


def events(run_dir: Path) -> list[tuple[int, str, str]]:
    rows = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [(row["step"], row["event"], row["detail"]) for row in rows]


def test_stop_saves_leaves_and_can_be_continued(tiny_corpus: Path, tmp_path: Path) -> None:
    config = with_alarm(tiny_corpus, "stop")
    assert run_distributed(train_rank, 2, config, tmp_path) == [86, 86]
    start, alarm, checkpoint = events(tmp_path)
    assert start[1] == "start"
    assert alarm[:2] == (2, "alarm")
    assert alarm[2].startswith("loss: loss = ")
    assert alarm[2].endswith(", above 0 for 2 records in a row")
    assert checkpoint == (2, "checkpoint", "step-00000002 on an alarm")
    assert run_distributed(train_rank, 2, config, tmp_path) == [86, 86]
    assert [row[0] for row in events(tmp_path)] == [0, 2, 2, 2, 4, 4]


@pytest.mark.slow
def test_save_saves_and_goes_on(tiny_corpus: Path, tmp_path: Path) -> None:
    assert run_distributed(train_rank, 2, with_alarm(tiny_corpus, "save"), tmp_path) == [0, 0]
    found = [row[:2] for row in events(tmp_path)]
    assert found == [(0, "start"), (2, "alarm"), (2, "checkpoint"), (13, "checkpoint")]


@pytest.mark.slow
def test_a_metric_that_no_record_has_is_told(tiny_corpus: Path, tmp_path: Path) -> None:
    config = with_alarm(tiny_corpus, "stop", metric="los")
    assert run_distributed(train_rank, 2, config, tmp_path) == [0, 0]
    # The commit of the same step is told by the thread that saves.
    assert (13, "alarm_unseen") in [row[:2] for row in events(tmp_path)]
