import json
from pathlib import Path

import pytest

from launch.inspect_run import print_logs, print_status
from launch.run_dir import RunDirError, held, write_status
from train.events import append_event


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").touch()
    write_status(tmp_path, state="running", reason="attempt 1", ranks=2)
    record = {"step": 1234, "tokens": 56789, "loss": 1.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for attempt in (1, 2):
        folder = tmp_path / f"logs/attempt-{attempt}"
        folder.mkdir(parents=True)
        for rank in (0, 1):
            lines = "".join(f"{attempt} {rank} {line}\n" for line in range(60))
            (folder / f"rank-{rank}.log").write_text(lines)
    return tmp_path


def test_status_is_of_now(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(run_dir):
        assert print_status(run_dir, as_json=False) == 0
        assert print_status(run_dir, as_json=True) == 0
    text, _, answer = capsys.readouterr().out.partition("{")
    assert text == (
        f"{run_dir}: running (attempt 1)\n"
        "  step 1234, 56,789 tokens, loss 1.5000\n"
        "  newest checkpoint: none\n"
    )
    assert json.loads("{" + answer) == {
        "state": "running",
        "step": 1234,
        "tokens": 56789,
        "last_checkpoint": None,
        "reason": "attempt 1",
        "ranks": 2,
    }


def test_a_run_whose_launcher_is_gone_does_not_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_status(run_dir, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["state"] == "failed"
    assert "the launcher was killed" in answer["reason"]


def test_logs_are_those_of_the_newest_attempt(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_logs(run_dir, rank=1)
    assert capsys.readouterr().out == "".join(f"2 1 {line}\n" for line in range(60))
    print_logs(run_dir, rank=None)
    out = capsys.readouterr().out
    assert out.startswith(f"==> {run_dir}/logs/attempt-2/rank-0.log (60 lines)\n2 0 20\n")
    assert out.endswith("2 1 59\n")
    with pytest.raises(RunDirError, match="--rank 2: the newest attempt has ranks 0 to 1"):
        print_logs(run_dir, rank=2)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run"):
        print_status(tmp_path, as_json=True)
    with pytest.raises(RunDirError, match="holds no run"):
        print_logs(tmp_path, rank=0)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunDirError, match="no rank has started yet"):
        print_logs(tmp_path, rank=None)


def test_a_run_that_waits_in_a_queue_is_submitted(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "status.json").unlink()
    append_event(run_dir, step=0, rank=0, event="submit", detail="slurm job 12")
    print_status(run_dir, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["state"], answer["reason"]) == ("submitted", "slurm job 12, has not started yet")
