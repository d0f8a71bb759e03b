"""Bytes of a folder, on this machine or behind a URL, as `data.reader` asks for them.

Local files are read by position and not through a memory map, for a file that shrinks under a map
kills the process. URLs (`s3://`, `gs://`, `memory://`, ...) go through fsspec, which asks for the
package of each kind of storage when it is missing. Reads that fail are tried again, with growing
pauses; a file that is not there is not.
"""

import os
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from data.config import FaultConfig

T = TypeVar("T")

_MAX_PAUSE_SECONDS = 60.0
_MAX_OPEN_FILES = 64
_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors that another attempt would meet again."""


class UnreadableError(OSError):
    """A read failed at every attempt. It says nothing of the data, so no sample is skipped for it."""


class Folder(ABC):
    """A folder with the files of a split."""

    def __init__(self, place: str, faults: FaultConfig) -> None:
        self.place = place
        """As the recipe has it."""
        self._attempts = Retrying(
            stop=stop_after_attempt(faults.read_attempts),
            wait=wait_exponential_jitter(
                multiplier=faults.retry_seconds, max=_MAX_PAUSE_SECONDS, jitter=faults.retry_seconds
            ),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )

    def where(self, name: str) -> str:
        """The file as people look for it."""
        return f"{self.place.rstrip('/')}/{name}"

    def read(self, name: str, start: int, size: int) -> bytes:
        """Bytes start .. start + size of a file, or fewer where the file is shorter.

        Raises:
            FileNotFoundError: there is no such file.
            UnreadableError: every attempt failed.
        """
        try:  # a call more would cost a tenth of a small read
            return self._read(name, start, size)
        except _PERMANENT:
            raise
        except OSError as error:
            action = partial(self._read, name, start, size)
            return self._tried_again(action, self.where(name), error)

    def view(self, name: str) -> NDArray[np.uint8]:
        """All of a file, which must not change: mapped where that is possible, else in memory.

        Raises:
            FileNotFoundError: there is no such file.
            UnreadableError: every attempt failed.
        """
        return self._retried(lambda: self._view(name), name)

    def sizes(self) -> dict[str, int]:
        """Size of every file in the folder; empty if there is no such folder.

        Raises:
            UnreadableError: every attempt failed.
        """
        try:
            return self._retried(self._sizes, "")
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def close(self) -> None:  # noqa: B027  (files are not everywhere)
        """Close open files."""

    def _retried(self, action: Callable[[], T], name: str) -> T:
        try:
            return action()
        except _PERMANENT:
            raise
        except OSError as error:
            return self._tried_again(action, self.where(name), error)

    def _tried_again(self, action: Callable[[], T], where: str, failure: OSError) -> T:
        """Apart, for what tenacity does around a call costs more than most reads."""
        failures = [failure]

        def attempt() -> T:
            if failures:
                raise failures.pop()
            self.close()  # look for the file anew
            return action()

        try:
            return self._attempts(attempt)
        except _PERMANENT:
            raise
        except OSError as error:
            tries = self._attempts.statistics["attempt_number"]
            raise UnreadableError(
                f"{where}: {tries} attempts to read it failed, the last with "
                f"{type(error).__name__}: {error}; look after the storage, or give it longer with "
                "data.faults.read_attempts and retry_seconds"
            ) from error

    @abstractmethod
    def _read(self, name: str, start: int, size: int) -> bytes: ...

    @abstractmethod
    def _view(self, name: str) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _sizes(self) -> dict[str, int]: ...


class LocalFolder(Folder):
    """Keeps files open: those that were opened last."""

    def __init__(self, place: str, faults: FaultConfig) -> None:
        super().__init__(place, faults)
        self._path = Path(place)
        self._files: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)

    def where(self, name: str) -> str:
        """The absolute path."""
        return str(self._path.absolute() / name)

    def close(self) -> None:
        """Close open files."""
        _close_all(self._files)

    def _read(self, name: str, start: int, size: int) -> bytes:
        file = self._files.get(name)
        if file is None:
            file = self._open(name)
        raw = os.pread(file, size, start)
        return raw if len(raw) == size else self._read_rest(file, raw, start, size)

    def _read_rest(self, file: int, raw: bytes, start: int, size: int) -> bytes:
        """After a read that gave less than was asked for."""
        parts = [raw]
        while parts[-1] and (left := size - sum(map(len, parts))):
            parts.append(os.pread(file, left, start + size - left))
        return b"".join(parts)

    def _open(self, name: str) -> int:
        file = self._files[name] = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _view(self, name: str) -> NDArray[np.uint8]:
        # numpy's maps hold a file open each, and there may be more shards than files may be open.
        import torch  # noqa: PLC0415

        path = self._path / name
        size = path.stat().st_size
        if not size:
            return np.empty(0, np.uint8)
        mapped: NDArray[np.uint8] = torch.from_file(
            str(path), shared=False, size=size, dtype=torch.uint8
        ).numpy()
        mapped.flags.writeable = False
        return mapped

    def _sizes(self) -> dict[str, int]:
        with os.scandir(self._path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _close_all(files: OrderedDict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])


class RemoteFolder(Folder):
    """Behind a URL."""

    def __init__(self, place: str, faults: FaultConfig) -> None:
        super().__init__(place, faults)
        self._system, self._path = fsspec.core.url_to_fs(place)

    def _read(self, name: str, start: int, size: int) -> bytes:
        found: bytes = self._system.cat_file(self._file(name), start=start, end=start + size)
        return found

    def _view(self, name: str) -> NDArray[np.uint8]:
        return np.frombuffer(self._system.cat_file(self._file(name)), np.uint8)

    def _sizes(self) -> dict[str, int]:
        entries = self._system.ls(self._path, detail=True, refresh=True)
        return {
            entry["name"].rpartition("/")[2]: entry["size"]
            for entry in entries
            if entry["type"] == "file"
        }

    def _file(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


def open_folder(place: str, faults: FaultConfig) -> Folder:
    """The folder at a path or URL; nothing is read yet."""
    return (RemoteFolder if is_url(place) else LocalFolder)(place, faults)


def is_url(place: str) -> bool:
    """Whether fsspec has to reach it."""
    return "://" in place


def inside(place: str, name: str) -> str:
    """A file or folder in the folder at a path or URL."""
    return f"{place.rstrip('/')}/{name}" if is_url(place) else str(Path(place) / name)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT)
