"""How torch DCP writes and reads files here: hashed as they are written, and read to where they go.

The files are DCP's own, as any program with torch reads them.
"""

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import cast

import torch.futures
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
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


class DirectReader(FileSystemReader):
    """DCP's reader; tensors are read to where they go, by way of no other memory, in one piece.

    Of one that lies in the checkpoint in other pieces, only what is needed is read.

    Args:
        path: directory of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seen: dict[int, tuple[bytes, Tensor]] = {}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what a rank needs into its tensors, in the order of the files."""
        others = list[ReadItem]()
        for name, items in groupby(sorted(plan.items, key=self._place), key=self._file):
            with (Path(self.path) / name).open("rb", buffering=0) as stream:
                others += [item for item in items if not self._read(item, planner, stream)]
        return super().read_data(LoadPlan(others), planner)

    def _read(self, item: ReadItem, planner: LoadPlanner, stream: io.FileIO) -> bool:
        """Read a tensor; False if it is none, or if it does not lie in the file as in memory."""
        if item.type != LoadItemType.TENSOR:
            return False
        found = self._found(item)
        whole = self._without_content(found, stream)
        stored = narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
        if not stored.is_contiguous():
            return False
        target = planner.resolve_tensor(item).detach()
        assert stored.shape == target.shape
        room = target if _takes_bytes_of(target, stored) else torch.empty_like(stored, device="cpu")
        begin = found.offset + _content_offset(whole)
        stream.seek(begin + int(stored.storage_offset()) * stored.element_size())
        _fill(room.flatten().view(torch.uint8).numpy().data, stream)
        if room is not target:
            target.copy_(room)
        planner.commit_tensor(item, target)
        return True

    def _without_content(self, found: _StorageInfo, stream: io.FileIO) -> Tensor:
        """A stored tensor on the meta device.

        To take torch's file apart costs half a millisecond. What comes before the content says how the tensor
        lies in it: where that is the same, and the size of the whole, so is all the rest.
        """
        before, seen = self._seen.get(found.length, (b"", None))
        stream.seek(found.offset)
        if seen is not None and stream.read(len(before)) == before:
            return seen
        whole: Tensor = torch.load(
            self._slice_file(stream, found), map_location="meta", weights_only=True
        )
        if begin := _content_offset(whole):  # an empty tensor has none
            stream.seek(found.offset)
            self._seen[found.length] = stream.read(begin), whole
        return whole

    def _found(self, item: ReadItem) -> _StorageInfo:
        found: _StorageInfo = self.storage_data[item.storage_index]
        return found

    def _place(self, item: ReadItem) -> tuple[str, int]:
        found = self._found(item)
        return found.relative_path, found.offset

    def _file(self, item: ReadItem) -> str:
        return self._place(item)[0]


def _content_offset(whole: Tensor) -> int:
    """Where the numbers begin in the file of a tensor, as torch has noted it."""
    return whole.untyped_storage()._checkpoint_offset or 0


def _takes_bytes_of(target: Tensor, stored: Tensor) -> bool:
    same_type = target.dtype == stored.dtype and not target.is_conj() and not target.is_neg()
    return same_type and target.is_cpu and target.is_contiguous()


def _fill(room: memoryview, stream: io.FileIO) -> None:
    done = 0
    while done < len(room):
        number = stream.readinto(room[done:])
        if not number:
            raise EOFError(f"{stream.name!r} ends {len(room) - done} bytes too early")
        done += number


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
