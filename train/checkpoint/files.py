"""How torch DCP writes and reads files here: hashed as they are written, and read ahead.

The files are DCP's own, as any program with torch reads them.
"""

import hashlib
import io
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import cast

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

_BEGIN_BYTES = 1 << 24
"""The drive begins to write so many bytes of a file while the next ones are hashed."""
_AHEAD_BYTES = 1 << 26
"""A drive is asked for so many bytes while as many are copied."""
_REQUEST_BYTES = 1 << 20
"""Of one request: of a longer one the system may leave out the end."""


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
    """DCP's reader; the drive already works on the next tensors while some are copied.

    Args:
        path: directory of the checkpoint.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what a rank needs into its tensors, in the order of the files."""
        ahead, *others = self._groups(plan.items) or [[]]
        self._ask_for(ahead)
        for following in [*others, []]:
            self._ask_for(following)
            read = super().read_data(LoadPlan(ahead), planner)
            ahead = following
        return read

    def _groups(self, items: Iterable[ReadItem]) -> list[list[ReadItem]]:
        """What is read at a time; several tensors, or a large one."""
        groups: list[list[ReadItem]] = []
        room = 0
        for item in sorted(items, key=self._place):
            if room <= 0:
                groups.append([])
                room = _AHEAD_BYTES
            groups[-1].append(item)
            room -= self.storage_data[item.storage_index].length
        return groups

    def _place(self, item: ReadItem) -> tuple[str, int]:
        found = self.storage_data[item.storage_index]
        return found.relative_path, found.offset

    def _ask_for(self, items: Iterable[ReadItem]) -> None:
        """Have the system read parts of files into its memory; returns before it has."""
        parts = [self.storage_data[item.storage_index] for item in items]
        for name, of_file in groupby(parts, key=lambda part: part.relative_path):
            with (Path(self.path) / name).open("rb", buffering=0) as stream:
                for part in of_file:
                    end = part.offset + part.length
                    for begin in range(part.offset, end, _REQUEST_BYTES):
                        length = min(_REQUEST_BYTES, end - begin)
                        os.posix_fadvise(stream.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


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
        self._begun = 0
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        for begin in range(0, len(view), _BEGIN_BYTES):
            self._append(view[begin : begin + _BEGIN_BYTES])
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        """For whoever makes the content durable: all of it was handed to the system by now."""
        self._stream.flush()
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _append(self, view: memoryview) -> None:
        self.digest.update(view)
        self._stream.write(view)
        self.size += len(view)
        if self.size - self._begun >= _BEGIN_BYTES:
            # Linux begins to write what it is told to forget; what is not written yet, it keeps.
            length = self.size - self._begun
            os.posix_fadvise(self.fileno(), self._begun, length, os.POSIX_FADV_DONTNEED)
            self._begun = self.size
