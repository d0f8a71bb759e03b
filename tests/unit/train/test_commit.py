from pathlib import Path

from train.checkpoint.commit import (
    begin,
    checkpoint_path,
    commit,
    complete_checkpoints,
    newest_checkpoint,
    remove_old,
)


def make(run_dir: Path, step: int) -> Path:
    temporary = begin(run_dir, step)
    (temporary / "data").write_text(str(step))
    return commit(temporary)


def test_a_checkpoint_appears_whole_and_under_its_final_name(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 7)
    (temporary / "data").write_text("x")
    assert newest_checkpoint(tmp_path) is None
    final = commit(temporary)
    assert final == checkpoint_path(tmp_path, 7)
    assert newest_checkpoint(tmp_path) == (7, final)
    assert not temporary.exists()


def test_leftovers_of_a_killed_save_are_not_checkpoints_and_are_replaced(tmp_path: Path) -> None:
    leftover = begin(tmp_path, 3)
    (leftover / "half").write_text("x")
    assert complete_checkpoints(tmp_path) == []
    assert list(begin(tmp_path, 3).iterdir()) == []


def test_newest_goes_by_step_beyond_eight_digits(tmp_path: Path) -> None:
    make(tmp_path, 99_999_999)
    make(tmp_path, 100_000_000)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest[0] == 100_000_000


def test_remove_old_keeps_the_last_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    remove_old(tmp_path, 2)
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
