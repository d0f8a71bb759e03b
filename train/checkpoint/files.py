"""How torch DCP writes and reads files here: hashed as they are written, and read ahead.

The files are DCP's own, as any program with torch reads them.
"""

import hashlib
import io
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch.futures
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as save_options

from train.checkpoint.manifest import FileHash

_DURABLE_BYTES = 1 << 26
"""A file is made durable so many bytes at a time, while the next ones are hashed."""


_AHEAD_BYTES = 1 << 20
"""Read ahead at a time; stays in the processor's cache."""


class HashingWriter(FileSystemWriter):
    """DCP's writer; one file a rank, durable when it is written.

    Args:
        path: directory of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = self._files = _HashingFiles(path)

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write what the plan gives this rank."""
        # A CRC is weaker than the hash, and as slow. `patch` is there when the module has been run.
        with save_options.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            return super().write_data(plan, planner)

    @property
    def written(self) -> list[FileHash]:
        """What this rank has written."""
        return list(self._files.hashes.values())


class AheadReader(FileSystemReader):
    """DCP's reader; a thread reads ahead, so that the drive works while tensors are copied.

    Args:
        path: directory of the checkpoint.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what a rank needs into its tensors, in the order of the files."""
        places = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}

        def place(item: ReadItem) -> tuple[str, int]:
            found = places[item.storage_index]
            return found.relative_path, found.offset

        with ThreadPoolExecutor(1) as helper:
            items = sorted(plan.items, key=place)
            ahead = helper.submit(self._read_ahead, [places[item.storage_index] for item in items])
            read = super().read_data(LoadPlan(items), planner)
            ahead.result()
        return read

    def _read_ahead(self, places: Sequence[Any]) -> None:
        """Let the system have parts of files in memory; what is read is not looked at."""
        room = memoryview(bytearray(_AHEAD_BYTES))
        for name, parts in groupby(places, key=lambda place: place.relative_path):
            with (Path(self.path) / name).open("rb", buffering=0) as stream:
                for part in parts:
                    stream.seek(part.offset)
                    left = part.length
                    while left > 0 and (number := stream.readinto(room[:left])):
                        left -= number


class _HashingFiles(FileSystem):
    def __init__(self, root: Path) -> None:
        self._root = root
        self.hashes: dict[str, FileHash] = {}

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """Open a file; what is written to it is hashed."""
        with (
            super().create_stream(path, mode) as stream,
            _HashingStream(cast("io.BufferedIOBase", stream)) as hashing,
        ):
            yield hashing
        name = Path(path).relative_to(self._root).as_posix()
        self.hashes[name] = FileHash(name, hashing.size, hashing.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, whose hash goes with it."""
        super().rename(path, new_path)
        old, new = (Path(p).relative_to(self._root).as_posix() for p in (path, new_path))
        self.hashes[new] = FileHash(new, self.hashes[old].size, self.hashes.pop(old).sha256)


class _HashingStream(io.RawIOBase):
    """A file that is only appended to; the drive begins to work before all is there."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._fresh = 0
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        for begin in range(0, len(view), _DURABLE_BYTES):
            self._append(view[begin : begin + _DURABLE_BYTES])
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        """For whoever makes the content durable: all of it was handed to the system by now."""
        self._stream.flush()
        self._wait()
        return self._stream.fileno()

    def close(self) -> None:
        self._flusher.shutdown()
        self._stream.close()
        super().close()

    def _append(self, view: memoryview) -> None:
        self.digest.update(view)
        self._stream.write(view)
        self.size += len(view)
        self._fresh += len(view)
        if self._fresh >= _DURABLE_BYTES:
            self._wait()
            self._flushed = self._flusher.submit(os.fdatasync, self._stream.fileno())
            self._fresh = 0

    def _wait(self) -> None:
        """Raise what went wrong: the system tells it once, and not again when all is made durable."""
        if self._flushed is not None:
            self._flushed.result()
