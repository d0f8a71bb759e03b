"""The manifest of Engram's tables in a checkpoint: which files make up their rows, in which order.

In a checkpoint directory `engram/` holds a chain: a base, which is all rows that ever changed, and
the rows that changed up to each save since. Tables start as zeros, so at first there is no base. The
value of a row is that in the last file that has it. `engram_saves` writes chains and restores from
them, `engram_reader` looks rows up.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from parallel.engram_files import FileEntry

FOLDER = "engram"
"""Of a checkpoint directory."""
ArrayTypes = dict[str, tuple[str, tuple[int, ...]]]
"""Type of each array of a store, and shape of a row in it."""

_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Generation:
    """The files of all ranks from one time."""

    kind: Literal["base", "save"]
    step: int
    """Optimizer steps that are in it; of a base: those that surely are."""
    files: tuple[FileEntry, ...]

    @property
    def rows(self) -> int:
        """In all files."""
        return sum(entry.rows for entry in self.files)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds of the tables."""

    format: int = _FORMAT
    layers: dict[int, int]
    """Rows of each layer's table."""
    arrays: ArrayTypes
    chain: tuple[Generation, ...]
    """Oldest first."""

    @property
    def entries(self) -> list[FileEntry]:
        """All files, oldest first."""
        return [entry for generation in self.chain for entry in generation.files]


_ADAPTER = TypeAdapter(Manifest)


def holds_tables(checkpoint: Path) -> bool:
    """Whether a checkpoint has rows of host tables."""
    return (checkpoint / FOLDER / _MANIFEST).exists()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, durable like all names in its folder when this returns."""
    path = folder / _MANIFEST
    with path.open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        ValueError: it is missing or no manifest.
    """
    path = folder / _MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint holds no tables")
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: damaged: {error.errors()[0]['msg']}") from error
    if manifest.format != _FORMAT:
        raise ValueError(f"{path}: format {manifest.format}; this version reads {_FORMAT}")
    return manifest


def link_file(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, or, across file systems, copy it."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
