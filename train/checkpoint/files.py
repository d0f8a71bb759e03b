"""How torch DCP writes files here: each is hashed as it is written, without being read again."""

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from train.checkpoint.manifest import FileHash


class HashingWriter(FileSystemWriter):
    """DCP's writer; one file a rank, durable when it is written.

    Args:
        path: directory of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = self._files = _HashingFiles(path)

    @property
    def written(self) -> list[FileHash]:
        """What this rank has written."""
        return list(self._files.hashes.values())


class _HashingFiles(FileSystem):
    def __init__(self, root: Path) -> None:
        self._root = root
        self.hashes: dict[str, FileHash] = {}

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """Open a file; what is written to it is hashed."""
        with super().create_stream(path, mode) as stream:
            hashing = _HashingStream(cast("io.BufferedIOBase", stream))
            yield hashing
        name = Path(path).relative_to(self._root).as_posix()
        self.hashes[name] = FileHash(name, hashing.size, hashing.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, whose hash goes with it."""
        super().rename(path, new_path)
        old, new = (Path(p).relative_to(self._root).as_posix() for p in (path, new_path))
        self.hashes[new] = FileHash(new, self.hashes[old].size, self.hashes.pop(old).sha256)


class _HashingStream(io.RawIOBase):
    """A file that is only appended to."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.digest.update(view)
        self._stream.write(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # whoever asks makes the content durable
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
        super().close()
