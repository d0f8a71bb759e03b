"""What a checkpoint holds, by its metadata: no tensor is read. `mneme checkpoint inspect` calls this."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.engram_chain import FOLDER, holds_tables, read_manifest

_KINDS = {
    "model": "model",
    "optim": "optimizer",
    "buffer": "buffers",
    "data": "data",
    "rng": "rng",
    "engram": "engram",
}
"""First part of a name -> what it belongs to."""


@dataclass(frozen=True)
class Entry:
    """Something that has a name in a checkpoint."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    """None: no tensor."""
    dtype: str | None
    bytes: int
    """Of an Engram table: of all rows, those that never changed included, which are in no file."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint."""

    path: Path
    meta: dict[str, Any]
    """`checkpoint.json`: step, tokens, ranks that saved it, and more."""
    entries: tuple[Entry, ...]
    table_files: int
    """Files with rows of Engram's tables in host memory."""
    table_bytes: int
    """Of these files."""

    def totals(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes by kind, and of all; of tables the bytes on disk."""
        number, size = Counter(e.kind for e in self.entries), Counter[str]()
        for entry in self.entries:
            size[entry.kind] += entry.bytes
        if self.table_files:
            size["engram"] = self.table_bytes
        found = {kind: (number[kind], size[kind]) for kind in _KINDS.values() if number[kind]}
        return found | {"all": (sum(number.values()), sum(size.values()))}


def read_contents(checkpoint: Path) -> Contents:
    """Read the metadata of a committed checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        meta = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
        metadata = FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # unpickling damaged bytes raises anything
        raise ValueError(
            f"{checkpoint}: cannot be read: {type(error).__name__}: {error}; "
            f"`mneme checkpoint verify {checkpoint}` says what is damaged"
        ) from error
    stored: defaultdict[str, int] = defaultdict(int)
    for index, place in metadata.storage_data.items():
        stored[index.fqn] += place.length
    entries = []
    for name, value in metadata.state_dict_metadata.items():
        kind = _KINDS[name.partition(".")[0]]
        if isinstance(value, TensorStorageMetadata):
            dtype, shape = value.properties.dtype, tuple(value.size)
            size = math.prod(shape) * dtype.itemsize
            entries.append(Entry(name, kind, shape, str(dtype).removeprefix("torch."), size))
        else:
            entries.append(Entry(name, kind, None, None, stored[name]))
    files = read_manifest(checkpoint / FOLDER).entries if holds_tables(checkpoint) else []
    return Contents(
        path=checkpoint,
        meta=meta,
        entries=(*sorted(entries, key=lambda entry: entry.name), *_tables(checkpoint)),
        table_files=len(files),
        table_bytes=sum(file.size for file in files),
    )


def _tables(checkpoint: Path) -> Iterator[Entry]:
    """Engram's tables in host memory."""
    if not holds_tables(checkpoint):
        return
    manifest = read_manifest(checkpoint / FOLDER)
    for layer, rows in manifest.layers.items():
        for name, (dtype, row) in manifest.arrays.items():
            size = rows * math.prod(row) * np.dtype(dtype).itemsize
            yield Entry(f"engram.{layer}.{name}", "engram", (rows, *row), dtype, size)
