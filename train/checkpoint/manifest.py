"""The manifest of a checkpoint: its files, their sizes and hashes, a part of what is committed.

Writers hash what they write; `train.checkpoint.commit` hashes the few files that nobody did, and makes
all of it durable. A run that resumes compares sizes, `mneme checkpoint verify` every byte. No torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

MANIFEST = "manifest.json"
"""In the directory of a checkpoint."""
_FORMAT = 1


@dataclass(frozen=True)
class FileHash:
    """A file as it was written."""

    name: str
    """Below the checkpoint, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files of a checkpoint but the manifest itself."""

    format: int = _FORMAT
    files: tuple[FileHash, ...]


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written."""

    name: str
    """Below the checkpoint."""
    kind: Literal["missing", "changed", "extra"]
    detail: str


HashCache = dict[tuple[int, ...], str]
"""Device, inode, time of the last change -> sha256: checkpoints share files of Engram's tables."""

_ADAPTER = TypeAdapter(Manifest)


def seal(checkpoint: Path, written: Iterable[FileHash] = ()) -> None:
    """Write the manifest of a checkpoint that is not yet committed; all of it is durable afterwards.

    Args:
        checkpoint: its directory.
        written: hashes of files that were hashed, and made durable, as they were written.

    Raises:
        OSError: one of these is not here, or has another size.
    """
    known = {entry.name: entry for entry in written}
    names = list(_files(checkpoint))
    if missing := sorted(known.keys() - names):
        raise OSError(f"{checkpoint}: {', '.join(missing)}: written, but not here")
    found = [known.get(name) or _hash_durably(checkpoint, name) for name in names]
    for entry in found:
        if (size := (checkpoint / entry.name).stat().st_size) != entry.size:
            raise OSError(f"{checkpoint / entry.name}: has {size} bytes, {entry.size} were written")
    text = json.dumps(asdict(Manifest(files=tuple(found))), indent=1)
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    for directory in (*(p for p in checkpoint.rglob("*") if p.is_dir()), checkpoint):
        sync(directory)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: it is missing or no manifest.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST}: missing") from error
    except ValidationError as error:
        raise ValueError(f"{MANIFEST}: damaged: {error.errors()[0]['msg']}") from error
    if manifest.format != _FORMAT:
        raise ValueError(f"{MANIFEST}: format {manifest.format}; this version reads {_FORMAT}")
    return manifest


def obstacle(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, by its manifest and the sizes of its files; or None."""
    try:
        files = read_manifest(checkpoint).files
    except ValueError as error:
        return str(error)
    return next(
        (damage.detail for entry in files if (damage := _wrong_size(checkpoint, entry))), None
    )


def verify(checkpoint: Path, hashes: HashCache | None = None) -> list[Damage]:
    """Read every file of a checkpoint; what is missing, changed or not of it.

    Args:
        checkpoint: a committed one.
        hashes: of files that were read already; is added to.
    """
    try:
        files = read_manifest(checkpoint).files
    except ValueError as error:
        kind: Literal["missing", "changed"] = "missing"
        if (checkpoint / MANIFEST).exists():
            kind = "changed"
        return [Damage(MANIFEST, kind, str(error))]
    cache: HashCache = {} if hashes is None else hashes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda entry: _damage(checkpoint, entry, cache), files)
        found = [damage for damage in read if damage]
    extra = set(_files(checkpoint)) - {entry.name for entry in files}
    return found + [
        Damage(name, "extra", f"{name}: not of this checkpoint") for name in sorted(extra)
    ]


def sync(path: Path) -> None:
    """Make a directory's names, or a file's content, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(checkpoint: Path) -> Iterator[str]:
    """Names of all files but the manifest."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if not path.is_dir() and name != MANIFEST:
            yield name


def _hash_durably(checkpoint: Path, name: str) -> FileHash:
    with (checkpoint / name).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
        return FileHash(name, stream.tell(), digest)


def _wrong_size(checkpoint: Path, entry: FileHash) -> Damage | None:
    path = checkpoint / entry.name
    if not path.is_file():
        return Damage(entry.name, "missing", f"{entry.name}: missing")
    if (size := path.stat().st_size) != entry.size:
        return Damage(entry.name, "changed", f"{entry.name}: has {size} bytes, not {entry.size}")
    return None


def _damage(checkpoint: Path, entry: FileHash, cache: HashCache) -> Damage | None:
    if damage := _wrong_size(checkpoint, entry):
        return damage
    with (checkpoint / entry.name).open("rb") as stream:
        status = os.fstat(stream.fileno())
        # A run may go on meanwhile, and give the inode of a file that it removes to another one.
        file = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if file not in cache:
            cache[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    if cache[file] == entry.sha256:
        return None
    detail = f"{entry.name}: sha256 {cache[file]}, not {entry.sha256}"
    return Damage(entry.name, "changed", detail)
