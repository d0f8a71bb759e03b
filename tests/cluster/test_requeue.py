"""Whether a Slurm job is queued again: by exit code, by who asked, and by what it got done."""

from pathlib import Path

import pytest

from launch.cluster.requeue import refusal
from launch.run_dir import write_status
from train.checkpoint.commit import begin, commit
from train.config import LaunchConfig, RunConfig
from train.events import append_event
from train.recipe import save_resolved


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = RunConfig(name="toy", launch=LaunchConfig(max_restarts_without_progress=2))
    save_resolved(config, tmp_path / "recipe.yaml")
    write_status(tmp_path, state="running", reason="attempt 1", ranks=2)
    return tmp_path


def requeue(run_dir: Path, step: int, job: str = "7") -> None:
    append_event(run_dir, step=step, rank=0, event="requeue", detail="again", job=job)


@pytest.mark.parametrize(
    ("code", "asked", "said"),
    [
        (0, False, "the run is done"),
        (2, True, "what the user gave cannot be used"),
        (86, True, "an alarm stopped it"),
        (85, False, "stopped on request"),
        (85, True, None),
        (75, False, None),
        (137, False, None),
        (1, False, None),
    ],
)
def test_the_exit_code_decides(run_dir: Path, code: int, asked: bool, said: str | None) -> None:
    why = refusal(run_dir, code=code, asked=asked, job="7")
    assert why == said if said is None else said in (why or "")


def test_a_failure_that_the_launcher_reported_is_final(run_dir: Path) -> None:
    write_status(run_dir, state="failed", reason="rank 0 failed", ranks=2)
    assert refusal(run_dir, code=1, asked=False, job="7") == "the run failed; see above"


def test_the_budget_counts_requeues_of_this_job_without_a_new_checkpoint(run_dir: Path) -> None:
    def why() -> str | None:
        return refusal(run_dir, code=137, asked=False, job="7")

    requeue(run_dir, 0)
    requeue(run_dir, 0, job="6")
    assert why() is None
    requeue(run_dir, 0)
    assert why() == "2 requeues in a row without a new checkpoint"
    commit(begin(run_dir, 5))
    assert why() is None
    for _ in range(2):
        requeue(run_dir, 5)
    assert why() == "2 requeues in a row without a new checkpoint"
