import json
import os
from pathlib import Path

import pytest

from train.checkpoint.commit import (
    begin,
    checkpoint_path,
    choose,
    clean_up,
    commit,
    complete_checkpoints,
    newest_checkpoint,
    remove_old,
)
from train.checkpoint.manifest import MANIFEST, FileHash, read_manifest, seal, verify


def make(run_dir: Path, step: int) -> Path:
    temporary = begin(run_dir, step)
    (temporary / "data").write_text(f"step {step}")
    (temporary / "engram").mkdir()
    (temporary / "engram" / "rows").write_bytes(bytes(100))
    return commit(temporary)


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in complete_checkpoints(run_dir)]


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
    assert steps(tmp_path) == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_remove_old_keeps_multiples_for_good(tmp_path: Path) -> None:
    for step in range(50, 550, 50):
        make(tmp_path, step)
        remove_old(tmp_path, 2, 200)
    assert steps(tmp_path) == [200, 400, 450, 500]


def test_the_manifest_has_every_file_as_sha256sum_sees_it(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    listed = {entry.name: (entry.size, entry.sha256) for entry in read_manifest(path).files}
    # printf 'step 1' | sha256sum; head -c 100 /dev/zero | sha256sum
    assert listed == {
        "data": (6, "9a2deff46ae163a6c486098a08b796b7f8d506fb0a25eeec025f306b33b79aeb"),
        "engram/rows": (100, "cd00e292c5970d3c5e2f0ffa5171e555bc46bfc4faddfb4a418b6840b86e79a3"),
    }
    assert verify(path) == []


def test_all_is_durable_before_the_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that nobody made durable, every directory, then the rename, then its directory."""
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        log.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    make(tmp_path, 1)
    at = log.index("rename")
    name = "step-00000001.tmp"
    assert sorted(log[:at]) == sorted([tmp_path.name, "data", "rows", MANIFEST, "engram", name])
    assert log.index(name) > log.index(MANIFEST)
    assert log[at + 1 :] == ["checkpoints"]


def test_what_was_written_must_be_there_in_full(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 1)
    (temporary / "data").write_text("half")
    with pytest.raises(OSError, match="data: has 4 bytes, 9 were written"):
        seal(temporary, [FileHash("data", 9, "")])
    with pytest.raises(OSError, match="other: written, but not here"):
        commit(temporary, [FileHash("other", 1, "")])
    assert newest_checkpoint(tmp_path) is None


def test_verify_names_every_file_that_is_not_as_it_was(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (path / "data").write_text("step 2")
    (path / "engram" / "rows").unlink()
    (path / "engram" / "more").touch()
    found = [(damage.name, damage.kind) for damage in verify(path)]
    assert found == [
        ("data", "changed"),
        ("engram/rows", "missing"),
        ("engram/more", "extra"),
    ]
    (path / "data").write_text("step")
    assert verify(path)[0].detail == "data: has 4 bytes, not 6"
    (path / MANIFEST).unlink()
    assert [(damage.name, damage.kind) for damage in verify(path)] == [(MANIFEST, "missing")]


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("{", "damaged: "),
        ('{"format": 1}', "damaged: "),
        ('{"format": 9, "files": []}', "format 9"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str, detail: str) -> None:
    path = make(tmp_path, 1)
    (path / MANIFEST).write_text(content)
    [damage] = verify(path)
    assert (damage.name, damage.kind) == (MANIFEST, "changed")
    assert detail in damage.detail


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_what_it_skips(
    tmp_path: Path,
) -> None:
    assert choose(tmp_path).newest is None
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    begin(tmp_path, 5)
    (checkpoint_path(tmp_path, 4) / MANIFEST).unlink()
    (checkpoint_path(tmp_path, 3) / "data").write_text("short")
    choice = choose(tmp_path)
    assert choice.newest == (2, checkpoint_path(tmp_path, 2))
    assert [str(skipped) for skipped in (*choice.damaged, *choice.leftovers)] == [
        "step-00000004: manifest.json: missing",
        "step-00000003: data: has 5 bytes, not 6",
        "step-00000005.tmp: left by a save or a removal that was cut short",
    ]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5  # nothing was touched
    clean_up(tmp_path, choice)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000003.damaged",
        "step-00000004.damaged",
    ]
    assert steps(tmp_path) == [1, 2]
    make(tmp_path, 3)  # the name is free
    assert choose(tmp_path).newest == (3, checkpoint_path(tmp_path, 3))
    assert choose(tmp_path).damaged == ()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        manifest = make(tmp_path, step) / MANIFEST
        manifest.write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="no checkpoint is whole") as error:
        choose(tmp_path)
    assert "step-00000002: manifest.json: damaged" in str(error.value)
    assert "step-00000001: manifest.json: damaged" in str(error.value)
    assert f"mneme checkpoint verify {tmp_path}" in str(error.value)
