"""Reads that fail: which are tried again, how often, and what is said in the end."""

import errno
import os
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError

from data.config import FaultConfig
from data.storage import Folder, UnreadableError, open_folder

_QUICK = FaultConfig(read_attempts=3, retry_seconds=0.001)


class Failing:
    """Stands before a read and raises each error once, the last of them for ever."""

    def __init__(self, read: object, errors: list[Exception], forever: bool = False) -> None:
        self.read, self.errors, self.forever, self.calls = read, errors, forever, 0

    def __call__(self, *arguments: object, **keywords: object) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors[0] if self.forever else self.errors.pop(0)
        return self.read(*arguments, **keywords)  # type: ignore[operator, no-any-return]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Ten bytes."""
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    return path


def folder(file: Path, url: bool, faults: FaultConfig = _QUICK) -> Folder:
    return open_folder(f"file://{file.parent}" if url else str(file.parent), faults)


@pytest.mark.parametrize("url", [False, True])
def test_reads_by_position(file: Path, url: bool) -> None:
    storage = folder(file, url)
    assert storage.read("a", 2, 3) == b"234"
    assert storage.read("a", 8, 5) == b"89"
    assert storage.read("a", 20, 5) == b""
    assert storage.view("a").tobytes() == b"0123456789"
    assert storage.sizes() == {"a": 10}
    assert folder(file.parent / "none" / "a", url).sizes() == {}


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, url: bool, errors: list[Exception], forever: bool = False
) -> Failing:
    if url:
        system = fsspec.filesystem("file")
        failing = Failing(system.cat_file, errors, forever)
        monkeypatch.setattr(system, "cat_file", failing)
    else:
        failing = Failing(os.pread, errors, forever)
        monkeypatch.setattr(os, "pread", failing)
    return failing


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale"), FSTimeoutError("too slow")],
)
def test_a_read_that_fails_twice_is_tried_a_third_time(
    file: Path, url: bool, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = folder(file, url)
    failing = failing_reads(monkeypatch, url, [error, error])
    assert storage.read("a", 2, 3) == b"234"
    assert failing.calls == 3


@pytest.mark.parametrize("url", [False, True])
def test_a_read_that_always_fails_says_so(
    file: Path, url: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = folder(file, url)
    failing = failing_reads(monkeypatch, url, [OSError(errno.EIO, "broken")], forever=True)
    with pytest.raises(
        UnreadableError,
        match=r"/a: 3 attempts to read it failed, the last with OSError: .*broken; lo",
    ):
        storage.read("a", 2, 3)
    assert failing.calls == 3


@pytest.mark.parametrize("url", [False, True])
def test_a_file_that_is_not_there_is_tried_once(
    file: Path, url: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = folder(file, url)
    failing = failing_reads(monkeypatch, url, [FileNotFoundError("gone")], forever=True)
    with pytest.raises(FileNotFoundError):
        storage.read("a", 2, 3)
    assert failing.calls == 1


def test_pauses_double(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    storage = folder(file, False, FaultConfig(read_attempts=10, retry_seconds=0.5))
    failing_reads(monkeypatch, False, [OSError(errno.EIO, "broken")], forever=True)
    with pytest.raises(UnreadableError, match="10 attempts"):
        storage.read("a", 0, 1)
    for number, pause in enumerate(pauses):
        assert min(60, 0.5 * 2**number) <= pause <= min(60, 0.5 * 2**number + 0.5)
    assert len(pauses) == 9


def test_a_file_is_opened_anew_after_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that has gone stale does not come back; the path does."""
    storage = folder(file, False)
    storage.read("a", 0, 1)
    file.rename(file.with_name("old"))
    file.write_bytes(b"abcdefghij")
    assert storage.read("a", 0, 1) == b"0"  # the open file is still the old one
    failing_reads(monkeypatch, False, [OSError(errno.ESTALE, "stale")])
    assert storage.read("a", 0, 1) == b"a"


def test_an_empty_file_is_viewed(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert len(folder(tmp_path / "empty", False).view("empty")) == 0
