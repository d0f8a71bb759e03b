"""kill -9 at many moments of a run that saves all the time: nothing is lost, nothing is repeated."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import events, records, small_run, train_here
from tests.harness import fork_ranks, run_distributed
from train.checkpoint.commit import complete_checkpoints
from train.checkpoint.manifest import verify
from train.config import CheckpointConfig, RunConfig

KILLS = 50
TWO = {"data_parallel_size": 2, "expert_parallel_size": 2}


def trains(rank: int, config: RunConfig, run_dir: Path) -> None:
    os._exit(train_here(rank, config, run_dir))


def start_and_kill(config: RunConfig, run_dir: Path, store: Path, moment: random.Random) -> None:
    """Most kills come within a few steps and saves, some before the first of them."""
    attempts = len(attempted(run_dir))
    ranks = fork_ranks(trains, 2, store, config, run_dir)
    if moment.random() < 0.9:
        steps = moment.randrange(6)
        deadline = time.monotonic() + 60
        while len(attempted(run_dir)) == attempts or trained(run_dir) < steps:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in ranks)
            time.sleep(2e-3)
        time.sleep(moment.uniform(0.0, 0.15))
    else:
        time.sleep(moment.uniform(0.0, 1.0))
    for process in moment.sample(ranks, 2):
        process.kill()
    for process in ranks:
        process.join()
        # The other one may have lost its peer first.
        assert process.exitcode in (-signal.SIGKILL, 1)


def attempted(run_dir: Path) -> list[int]:
    """The steps after which attempts went on."""
    return [int(row["step"]) for kind in ("start", "resume") for row in events(run_dir, kind)]


def trained(run_dir: Path) -> int:
    """Steps of the newest attempt; its log cuts the file back a little later than it says so."""
    steps = [int(row["step"]) for row in records(run_dir)]
    return max([0, *steps]) - max(attempted(run_dir))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_50_moments_changes_nothing(tiny_corpus: Path, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "killed", tmp_path / "whole"
    for path in (run_dir, whole):
        path.mkdir()
    rules = CheckpointConfig(every_steps=2, keep_last=3, keep_every_steps=20)
    config = small_run(tiny_corpus, rules, steps=100_000, **TWO)
    moment = random.Random(7)
    committed, in_save = {0}, 0
    for kill in range(KILLS):
        before = len(attempted(run_dir))
        start_and_kill(config, run_dir, tmp_path / f"store-{kill}", moment)
        for step in attempted(run_dir)[before:]:
            assert step == max(committed), "went on after another step than the last committed one"
        for step, path in complete_checkpoints(run_dir):
            assert verify(path) == []
            committed.add(step)
        in_save += any((run_dir / "checkpoints").glob("step-*.tmp"))
    assert in_save >= KILLS // 10, "hardly killed in a save"

    steps = max(committed) + 5
    config = replace(config, train=replace(config.train, steps=steps))
    for path in (run_dir, whole):
        assert run_distributed(train_here, 2, config, path, timeout=500.0) == [0, 0]
    assert [row["step"] for row in records(whole)] == list(range(1, steps + 1))
    assert records(run_dir) == records(whole)
    saved = sorted({*range(2, steps + 1, 2), steps})
    kept = [step for step, _ in complete_checkpoints(run_dir)]
    assert kept == sorted({*range(20, steps + 1, 20), *saved[-3:]})
