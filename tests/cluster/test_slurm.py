"""`mneme launch --on slurm` on a real Slurm: two nodes train, are preempted, requeued, and go on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Slurm
from tests.distributed.launching import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 8
TRAIN = [
    *("train.global_batch_size=4", "train.micro_batch_size=1", "data.sequence_length=32"),
    *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2"),
    *(f"train.steps={STEPS}", "checkpoint.every_steps=3", "checkpoint.keep_last=9"),
    *("evaluate.every_steps=0", "optim.warmup_steps=3", "parallel.backend=cpu"),
    *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512"),
    *("monitor.wandb=false", "monitor.tensorboard=false", "launch.threads_per_rank=1"),
]
ON_TWO = [
    *("launch.nodes=2", "launch.stop_deadline_seconds=60", "cluster.time_limit_minutes=30"),
    "cluster.cpus_per_node=1",
    "cluster.env.MNEME_NOTE=two words",
]


def mneme(slurm: Slurm, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=slurm.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Slurm, recipe: Path, run_dir: Path, *overrides: str) -> str:
    words = [str(recipe), "--on", "slurm", "--run-dir", str(run_dir)]
    said = mneme(slurm, "launch", *words, *TRAIN, *ON_TWO, *overrides)
    found = re.match(r"submitted job (\d+): ", said)
    assert found, said
    return found[1]


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run_dir)]


def log(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in run_dir.glob("logs/slurm-*.log"))


@pytest.fixture(scope="module")
def recipe(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        "defaults: [v4_nano]\n"
        "data:\n"
        f"  tokenizer: {tiny_corpus}/tokenizer.json\n"
        "  sources:\n"
        f"    code: {{path: {tiny_corpus}/code}}\n"
        f"    docs: {{path: {tiny_corpus}/docs}}\n"
    )
    return path


@pytest.fixture(scope="module")
def on_one_node(slurm: Slurm, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ranks started by `mneme train`."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    mneme(slurm, "train", str(recipe), *TRAIN, "--run-dir", str(run_dir))
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def test_two_nodes_train_to_the_end_with_the_losses_of_one(
    slurm: Slurm, recipe: Path, on_one_node: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "two nodes"
    job = submit(slurm, recipe, run_dir)
    slurm.wait_for(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 300)
    assert slurm.state(job) == "COMPLETED", log(run_dir)
    assert losses(run_dir) == losses(on_one_node)
    assert slurm.field(job, "NumNodes") == "2"
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["ranks"]) == ("done", STEPS, 2)
    assert "not queued again: the run is done" in log(run_dir)
    assert "node 1: attempt 1, rank 1" in log(run_dir)
    assert "done (all steps done)" in mneme(slurm, "status", str(run_dir))
    assert "rank-1.log" in mneme(slurm, "logs", str(run_dir))


def test_a_job_that_is_preempted_saves_is_queued_again_and_goes_on(
    slurm: Slurm, recipe: Path, on_one_node: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "preempted"
    job = submit(slurm, recipe, run_dir)
    slurm.wait_for(lambda: len(rows(run_dir)) >= 2, 300)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.field(job, "Restarts") == "1", 120)
    assert "queued again: exit code 85" in log(run_dir)
    slurm.wait_for(
        lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), 300
    )
    assert slurm.state(job) == "COMPLETED", log(run_dir)
    assert losses(run_dir) == losses(on_one_node)  # each step once, and bitwise the same
    events = [row["event"] for row in rows(run_dir, "events.jsonl")]
    assert events.count("requeue") == events.count("resume") == 1
    assert len(list(run_dir.glob("logs/attempt-*"))) == 2


def test_a_job_that_is_asked_to_end_saves_and_is_not_queued_again(
    slurm: Slurm, recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "ended"
    job = submit(slurm, recipe, run_dir, "train.steps=100000")
    slurm.wait_for(lambda: len(rows(run_dir)) >= 1, 300)
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait_for(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), 120)
    assert slurm.field(job, "ExitCode") == "85:0", log(run_dir)
    assert "not queued again: it was stopped on request" in log(run_dir)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (run_dir / status["last_checkpoint"]).is_dir()


def test_slurm_itself_lets_a_job_save_before_its_time_is_over(
    slurm: Slurm, recipe: Path, tmp_path: Path
) -> None:
    """It looks for such jobs every half a minute."""
    run_dir = tmp_path / "limited"
    job = submit(slurm, recipe, run_dir, "train.steps=100000", "checkpoint.every_steps=100000")
    slurm.wait_for(lambda: len(rows(run_dir)) >= 2, 300)
    # The minutes that it has run, and at most two more.
    hours, minutes, _ = slurm.field(job, "RunTime").split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    assert slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}") == ""
    slurm.wait_for(lambda: slurm.field(job, "Restarts") == "1", 180)
    assert "queued again: exit code 85" in log(run_dir)
    before = rows(run_dir)[-1]["step"]
    slurm.wait_for(lambda: rows(run_dir)[-1]["step"] > before, 300)
    steps = [row["step"] for row in rows(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait_for(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), 120)
    resumed = [row for row in rows(run_dir, "events.jsonl") if row["event"] == "resume"]
    assert [row["step"] for row in resumed] == [before]
