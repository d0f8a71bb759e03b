"""Writing files of Engram's table rows, see `engram_files`; called by `engram_saves`."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.engram_files import (
    CHUNK_BYTES,
    DTYPE_CODES,
    INDEX,
    Arrays,
    FileEntry,
    Numbers,
    TablePlace,
    as_records,
)


@dataclass(frozen=True)
class Section:
    """What is written of a layer: all rows that the rank holds, or some."""

    layer: int
    held: range
    """Rows of the layer on this rank."""
    local: int
    """Local number of the first of them; the others follow it."""
    chosen: Numbers | None = None
    """Ascending local numbers of the rows to write; None: all."""
    copies: Arrays | None = None
    """The chosen rows as they were at some time, in the same order; None: they are live."""

    def __len__(self) -> int:
        return len(self.held) if self.chosen is None else len(self.chosen)

    def rows(self, begin: int, end: int) -> Numbers:
        """Local numbers of some of the rows to write, by their places among them."""
        if self.chosen is not None:
            return self.chosen[begin:end]
        return np.arange(self.local + begin, self.local + min(end, len(self.held)), dtype=np.int64)


class StoppedError(Exception):
    """Writing was given up on request; nothing is left of the file."""


def sections_of(
    tables: Sequence[TablePlace], rank: int, ranks: int, chosen: Numbers | None = None
) -> list[Section]:
    """What to write of a rank, layer by layer; layers without rows are left out.

    Args:
        tables: of the rank's group.
        rank: in the group.
        ranks: of the group.
        chosen: ascending local numbers; None: all rows.
    """
    sections = []
    for table in tables:
        held = table.held(rank, ranks)
        first = table.local(held.start, ranks)
        section = Section(table.layer, held, first)
        if chosen is not None:
            begin, end = np.searchsorted(chosen, [first, first + len(held)])
            section = Section(table.layer, held, first, chosen[begin:end])
        if len(section):
            sections.append(section)
    return sections


def copy_rows_of(arrays: Arrays, sections: Sequence[Section]) -> list[Section]:
    """Sections of chosen rows, with copies of these."""
    return [
        replace(
            section,
            copies={
                name: as_records(array)[section.chosen]
                .view(array.dtype)
                .reshape(-1, *array.shape[1:])
                for name, array in arrays.items()
            },
        )
        for section in sections
    ]


def write_file(
    path: Path,
    arrays: Arrays,
    sections: Sequence[Section],
    *,
    ahead: Callable[[Numbers], None] | None = None,
    stop: threading.Event | None = None,
) -> FileEntry:
    """Write rows of live arrays, or copies, durable when this returns; needs a few chunks of memory.

    Args:
        path: of the file.
        arrays: of the store; of copies, only the types count.
        sections: the rows.
        ahead: is told which local rows are going to be read: they may be on a drive.
        stop: to be set by another thread.

    Raises:
        StoppedError: `stop` was set; the file is gone.
    """
    tensors = [
        (f"layers.{section.layer}.{name}", section, name)
        for section in sections
        for name in ([] if section.chosen is None else [INDEX]) + list(arrays)
    ]
    # Wide types first: with no gaps, which the format forbids, all stay aligned.
    tensors.sort(key=lambda tensor: -_dtype(arrays, tensor[2]).itemsize)
    header = _header(arrays, tensors)
    digest, size = hashlib.sha256(header), len(header)
    try:
        with path.open("wb") as stream:
            stream.write(header)
            for _, section, name in tensors:
                for chunk in _chunks(arrays, section, name, ahead):
                    if stop is not None and stop.is_set():
                        raise StoppedError
                    data = chunk.data.cast("B")
                    digest.update(data)
                    stream.write(data)
                    size += len(data)
            stream.flush()
            os.fsync(stream.fileno())
    except StoppedError:
        path.unlink()
        raise
    held = {s.layer: (s.held.start, s.held.stop, s.held.step) for s in sections}
    return FileEntry(path.name, size, digest.hexdigest(), sum(map(len, sections)), held)


class BackgroundWriter(threading.Thread):
    """Writes rows of live arrays to a file beside whatever else this process does.

    Args:
        path: see `write_file`, as for all others.
        arrays: of the store.
        sections: the rows.
        ahead: is told what is going to be read.
    """

    def __init__(
        self,
        path: Path,
        arrays: Arrays,
        sections: Sequence[Section],
        *,
        ahead: Callable[[Numbers], None],
    ) -> None:
        super().__init__(name="engram base", daemon=True)
        self.path, self._arrays, self._sections, self._ahead = path, arrays, sections, ahead
        self._stop_request = threading.Event()
        self.entry: FileEntry | None = None
        """Once the file is whole."""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Write the file."""
        try:
            self.entry = write_file(
                self.path, self._arrays, self._sections, ahead=self._ahead, stop=self._stop_request
            )
        except StoppedError:
            pass
        except Exception as error:  # raised in the next save
            self.error = error

    def stop(self) -> None:
        """Give up; the file is gone when this returns."""
        self._stop_request.set()
        self.join()
        self.path.unlink(missing_ok=True)


def _dtype(arrays: Arrays, name: str) -> np.dtype[Any]:
    return np.dtype(np.int64) if name == INDEX else arrays[name].dtype


def _header(arrays: Arrays, tensors: Sequence[tuple[str, Section, str]]) -> bytes:
    """The header of a safetensors file."""
    header, end = {}, 0
    for key, section, name in tensors:
        shape = [len(section)] if name == INDEX else [len(section), *arrays[name].shape[1:]]
        dtype = _dtype(arrays, name)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(
    arrays: Arrays, section: Section, name: str, ahead: Callable[[Numbers], None] | None
) -> Iterator[NDArray[Any]]:
    """The bytes of a tensor, in copies: others may write to the arrays, and hash and file agree."""
    held = arrays if section.copies is None else section.copies
    records = as_records(held[name]) if name != INDEX else None
    size = 8 if records is None else records.dtype.itemsize
    length = max(1, CHUNK_BYTES // size)
    for begin in range(0, len(section), length):
        rows = section.rows(begin, begin + length)
        if records is None:
            yield section.held.start + (rows - section.local) * section.held.step
            continue
        if section.copies is not None:
            yield records[begin : begin + length].view(np.uint8)
            continue
        if ahead is not None:
            ahead(rows)
        part = rows if section.chosen is not None else slice(rows[0], rows[0] + len(rows))
        yield records[part].copy().view(np.uint8)
