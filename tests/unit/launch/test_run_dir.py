import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.run_dir import (
    RunDirError,
    held,
    is_held,
    last_attempt_logs,
    last_record,
    new_run_dir,
    next_attempt,
    progress,
    started_in,
    write_environment,
    write_recipe,
    write_status,
)
from train.config import RunConfig, TrainConfig
from train.recipe import load_resolved


def test_default_directories_are_new_and_named_after_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {new_run_dir("nano", None) for _ in range(5)}
    assert len(paths) == 5
    assert all(path.is_dir() and path.match("runs/nano-*") for path in paths)


def test_a_directory_in_use_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    assert new_run_dir("nano", tmp_path / "a/b") == tmp_path / "a/b"
    assert new_run_dir("nano", tmp_path / "a/b").is_dir()
    (tmp_path / "a/b/note").touch()
    with pytest.raises(RunDirError, match=r"not empty; use another name"):
        new_run_dir("nano", tmp_path / "a/b")
    (tmp_path / "a/b/recipe.yaml").touch()
    with pytest.raises(RunDirError, match=r"use `mneme resume .*/a/b`, or another name"):
        new_run_dir("nano", tmp_path / "a/b")
    with pytest.raises(RunDirError, match="not empty"):
        new_run_dir("nano", tmp_path / "a/b/note")


def test_a_changed_recipe_keeps_the_old_one_by_attempt(tmp_path: Path) -> None:
    first = RunConfig(name="a")
    second = replace(first, train=TrainConfig(steps=7))
    write_recipe(tmp_path, first, ["model=x", "train.steps=100"])
    for attempt in (1, 2):
        assert next_attempt(tmp_path) == attempt
        (tmp_path / f"logs/attempt-{attempt}").mkdir(parents=True)
    write_recipe(tmp_path, second, ["train.steps=7"])
    assert load_resolved(tmp_path / "recipe.attempt-2.yaml") == first
    assert load_resolved(tmp_path / "recipe.yaml") == second
    overrides = (tmp_path / "overrides.txt").read_text()
    assert overrides == "model=x\ntrain.steps=100\ntrain.steps=7\n"


def test_attempts_are_ordered_by_number(tmp_path: Path) -> None:
    assert last_attempt_logs(tmp_path) is None
    for attempt in (9, 10, 2):
        (tmp_path / f"logs/attempt-{attempt}").mkdir(parents=True)
    assert next_attempt(tmp_path) == 11
    assert last_attempt_logs(tmp_path) == tmp_path / "logs/attempt-10"


def test_the_environment_says_how_to_repeat_the_run(tmp_path: Path) -> None:
    assert started_in(tmp_path) is None
    write_environment(tmp_path)
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["attempt"] == 1
    assert found["packages"]["torch"].startswith("2.")
    assert found["cores"] == os.cpu_count()
    assert set(found) >= {"argv", "host", "python", "machine", "git", "time"}
    assert started_in(tmp_path) == Path.cwd()


def test_the_status_is_what_the_ranks_wrote(tmp_path: Path) -> None:
    assert progress(tmp_path) == {"step": 0, "tokens": 0, "last_checkpoint": None}
    rows = [{"step": step, "tokens": 10 * step, "pad": "x" * 5000} for step in range(1, 40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 40, "tok')
    for name in ("step-00000005", "step-00000030", "step-00000035.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    write_status(tmp_path, state="stopped", reason="because", ranks=4)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "stopped",
        "step": 39,
        "tokens": 390,
        "last_checkpoint": "checkpoints/step-00000030",
        "reason": "because",
        "ranks": 4,
    }


def test_no_whole_record_is_none(tmp_path: Path) -> None:
    assert last_record(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    assert last_record(tmp_path) is None


def test_a_run_is_held_by_one(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(RunDirError, match="is being trained by another"), held(tmp_path):
            pass
    assert not is_held(tmp_path)
    with held(tmp_path):
        pass


def test_a_launcher_on_another_machine_keeps_others_out_while_it_gives_signs_of_life(
    tmp_path: Path,
) -> None:
    """Locks may not reach from one machine to the other; the file and its time do."""
    lock = tmp_path / ".lock"
    lock.write_text("another-host")
    assert is_held(tmp_path)
    with pytest.raises(RunDirError, match="another mneme process on another-host"), held(tmp_path):
        pass
    os.utime(lock, (time.time() - 31, time.time() - 31))
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert lock.read_text() == platform.node()
    assert lock.read_text() == ""
