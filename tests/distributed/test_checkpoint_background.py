"""Saves behind the next steps of training: what they hold, what fails, and stop requests meanwhile."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from parallel.engram_reader import open_tables
from tests.checkpoints import events, records, small_run, train_here
from tests.harness import fork_ranks, run_distributed
from train.checkpoint.commit import begin, commit, complete_checkpoints
from train.checkpoint.files import HashingWriter
from train.checkpoint.manifest import verify
from train.checkpoint.together import SaveError
from train.config import CheckpointConfig, RunConfig
from train.step import train_step

SAVER = "train.checkpoint.saver"
EVERY = CheckpointConfig(every_steps=2, keep_last=99)
STEPS = 6
TWO = {"data_parallel_size": 2, "expert_parallel_size": 2}


def contents(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Every tensor and value, and every row of the tables."""
    dcp_to_torch_save(str(checkpoint), str(scratch))
    found: dict[str, Any] = torch.load(scratch, weights_only=False)
    tables = open_tables(checkpoint)
    for layer, rows in tables.layers.items():
        found[f"engram.{layer}"] = torch.from_numpy(tables.rows(layer, np.arange(rows)))
    return found


def slowly(rank: int, config: RunConfig, run_dir: Path) -> int:
    """Each save begins to write when training is at least a step further."""
    at = [0]

    def count(training: Any, batch: Any, step: int) -> Any:
        at[0] = step
        return train_step(training, batch, step)

    def wait(run_dir: Path, step: int) -> Path:
        deadline = time.monotonic() + 20
        while at[0] < min(step + 2, STEPS) and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert at[0] > step or step == STEPS
        return begin(run_dir, step)

    with patch(f"{SAVER}.begin", wait), patch("train.loop.train_step", count):
        return train_here(rank, config, run_dir)


def test_what_is_saved_is_the_state_of_its_step_though_training_went_on(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    waiting, behind = tmp_path / "waiting", tmp_path / "behind"
    for run_dir in (waiting, behind):
        run_dir.mkdir()
    config = small_run(tiny_corpus, replace(EVERY, asynchronous=False), steps=STEPS, **TWO)
    assert run_distributed(train_here, 2, config, waiting) == [0, 0]
    config = replace(config, checkpoint=EVERY)
    assert run_distributed(slowly, 2, config, behind) == [0, 0]
    assert records(behind) == records(waiting)
    steps = [step for step, _ in complete_checkpoints(behind)]
    assert steps == [2, 4, 6]
    for step in steps:
        name = f"checkpoints/step-{step:08d}"
        wanted = contents(waiting / name, tmp_path / "wanted.pt")
        found = contents(behind / name, tmp_path / "found.pt")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
            assert same, (step, key)
        assert verify(behind / name) == verify(waiting / name) == []
    told = events(behind, "checkpoint")
    assert [(row["step"], row["detail"]) for row in told] == [
        (step, f"step-{step:08d}") for step in steps
    ]
    assert all(0 < float(row["blocked_seconds"]) < float(row["total_seconds"]) for row in told)


def fails_once(rank: int, config: RunConfig, run_dir: Path, broken: int) -> tuple[str, int]:
    """The error, and the step before which it was raised."""
    write_data, seen = HashingWriter.write_data, [0]

    def no_space(self: HashingWriter, *args: Any) -> Any:
        if rank == broken and "00000004" in str(self.path):
            time.sleep(0.2)  # so that training goes on
            raise OSError(28, "No space left on device")
        return write_data(self, *args)

    def count(training: Any, batch: Any, step: int) -> Any:
        seen[0] = step
        return train_step(training, batch, step)

    with (
        patch.object(HashingWriter, "write_data", no_space),
        patch("train.loop.train_step", count),
        pytest.raises(SaveError) as error,
    ):
        train_here(rank, config, run_dir)
    return str(error.value), seen[0]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_save_that_fails_on_one_rank_ends_all_at_the_same_step(
    tiny_corpus: Path, tmp_path: Path, asynchronous: bool
) -> None:
    rules = replace(EVERY, asynchronous=asynchronous)
    config = small_run(tiny_corpus, rules, steps=50, **TWO)
    (one, at), (other, there) = run_distributed(fails_once, 2, config, tmp_path, 1)
    assert one == other
    assert one == (
        "the checkpoint of step 4 was not saved:\n"
        "rank 1: OSError: [Errno 28] No space left on device"
    )
    assert at == there
    assert at in ((5, 6) if asynchronous else (4,))
    assert [row["step"] for row in records(tmp_path)] == list(range(1, at + 1))
    [(step, path)] = complete_checkpoints(tmp_path)
    assert (step, verify(path)) == (2, [])
    assert [row["step"] for row in events(tmp_path, "checkpoint")] == [2]


def stopped(rank: int, config: RunConfig, run_dir: Path) -> None:
    """Every commit takes long, so that the request comes while one is under way."""

    def late(temporary: Path, written: Any) -> Path:
        (run_dir / "committing").touch()
        time.sleep(1.0)
        return commit(temporary, written)

    with patch(f"{SAVER}.commit", late):
        os._exit(train_here(rank, config, run_dir))


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stop_request_to_one_rank_while_a_save_is_under_way(
    tiny_corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = small_run(tiny_corpus, replace(EVERY, every_steps=10), steps=10_000, **TWO)
    ranks = fork_ranks(stopped, 2, tmp_path / "store", config, tmp_path)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "committing").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pid = ranks[1].pid
        assert pid is not None
        asked = time.monotonic()
        os.kill(pid, number)
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [85, 85]
        assert time.monotonic() - asked < 20
    finally:
        for process in ranks:
            process.kill()
    last = records(tmp_path)[-1]["step"]
    assert [step for step, _ in complete_checkpoints(tmp_path)] == sorted({10, last})
    assert all(verify(path) == [] for _, path in complete_checkpoints(tmp_path))
    assert [row["step"] for row in events(tmp_path, "checkpoint")] == sorted({10, last})
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_writes_what_it_skipped(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    """Bit by bit the same run, though it goes on from an older step; and it saves that step again."""
    config = small_run(tiny_corpus, EVERY, steps=6, **TWO)
    assert run_distributed(train_here, 2, config, tmp_path) == [0, 0]
    wanted = records(tmp_path)
    newest = tmp_path / "checkpoints/step-00000006"
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    newest.with_name("step-00000008.tmp").mkdir()
    assert run_distributed(train_here, 2, config, tmp_path) == [0, 0]
    assert [row["step"] for row in events(tmp_path, "resume")] == [4]
    damaged, leftover = (row["detail"] for row in events(tmp_path, "skipped_checkpoint"))
    assert damaged.startswith("step-00000006: __0_0.distcp: has ")
    assert damaged.endswith("; kept as step-00000006.damaged")
    assert leftover == (
        "step-00000008.tmp: left by a save or a removal that was cut short; removed"
    )
    assert records(tmp_path) == wanted
    assert verify(newest) == []


def refused(rank: int, config: RunConfig, run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint is whole:\n  step-00000002: manifest"):
        train_here(rank, config, run_dir)


def test_no_whole_checkpoint_is_refused_on_all_ranks(tiny_corpus: Path, tmp_path: Path) -> None:
    """To begin again at step 1 would take away what the user may still be able to put back."""
    path = tmp_path / "checkpoints/step-00000002"
    path.mkdir(parents=True)
    run_distributed(refused, 2, small_run(tiny_corpus, EVERY, steps=4, **TWO), tmp_path)
    assert path.is_dir()
