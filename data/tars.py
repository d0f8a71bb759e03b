"""Reads a tar of samples from front to back, and notices what `tarfile` passes over in silence.

`data.indexing` and `data.foreign` make indexes with this, `data.verify` compares. Python's reader, and so every stock reader,
takes a damaged header and a cut between two members for the end of the archive.
"""

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import IO, cast

BLOCK = 512
_READ_BYTES = 2**20


class CorruptShardError(RuntimeError):
    """Bytes on disk are not the ones that were written. Names the shard and, if known, the sample."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in the tar. The name is data: it is never used as a path."""

    name: str
    offset: int
    """Of the payload in the tar."""
    payload: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """Name of the sample it belongs to."""
        return split_name(self.name)[0]

    @property
    def extension(self) -> str:
        """What it is of the sample."""
        return split_name(self.name)[1]

    @property
    def crc32(self) -> int:
        """Checksum of the payload."""
        return zlib.crc32(self.payload)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def printable(name: str) -> str:
    """A name in a tar for the terminal: characters that could control it become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def padded(size: int) -> int:
    """Bytes that a payload takes in the tar."""
    return -(-size // BLOCK) * BLOCK


def read_samples(tar: Path, ignored: Counter[str] | None = None) -> Iterator[list[TarMember]]:
    """Yield the samples, each a list of members that follow each other and share their key.

    Memory: one sample.

    Args:
        tar: an uncompressed tar.
        ignored: counts what is no member of a sample (folders, links, names without a key or an
            extension), by its kind; None refuses such members.

    Raises:
        CorruptShardError: the tar is cut short or damaged.
    """
    with tar.open("rb") as file:
        sample: list[TarMember] = []
        for member in _members(tar, file, ignored):
            if sample and member.key != sample[0].key:
                yield sample
                sample = []
            sample.append(member)
        if sample:
            yield sample


def _members(tar: Path, file: BufferedIOBase, ignored: Counter[str] | None) -> Iterator[TarMember]:
    end, previous = 0, "the start"
    for info, stop in read_headers(tar, file):
        kind = _unusable(info)
        if kind and ignored is None:
            raise CorruptShardError(f"{tar}, {info.name}: {kind}, not a member of a sample")
        if kind and ignored is not None:
            ignored[kind] += 1
        else:
            file.seek(info.offset_data)
            payload = file.read(info.size)
            if len(payload) != info.size:
                raise CorruptShardError(f"{tar}: cut short inside {info.name}")
            yield TarMember(info.name, info.offset_data, payload)
        end, previous = stop, split_name(info.name)[0]
    if not ends_at(file, end):
        raise CorruptShardError(f"{tar}: damaged or cut short after {previous}")


def read_headers(tar: Path, file: BufferedIOBase) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each header from where the file stands, and where the next one is expected.

    Stops without an error where `tarfile` sees an end: compare with `ends_at`.

    Raises:
        CorruptShardError: a header is damaged and `tarfile` says so.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:
            while (info := archive.next()) is not None:
                if info.size < 0:
                    raise CorruptShardError(f"{tar}, {info.name}: has {info.size} bytes")
                yield info, archive.offset
                # It would keep all that it has passed. typeshed does not know this attribute.
                archive.members.clear()  # type: ignore[attr-defined]
    # The latter two: numbers and texts in the header that are none.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise CorruptShardError(f"{tar}: {error}") from error


def ends_at(file: BufferedIOBase, position: int) -> bool:
    """Whether the archive ends there: with two or more blocks of zeros up to the end of the file."""
    file.seek(position)
    zeros = 0
    while block := file.read(_READ_BYTES):
        if block.strip(b"\0"):
            return False
        zeros += len(block)
    return zeros >= 2 * BLOCK


def _unusable(info: tarfile.TarInfo) -> str:
    if not info.isreg() or info.issparse():
        return "folder" if info.isdir() else "no plain file"
    key, extension = split_name(info.name)
    if not extension or not key or key.endswith("/"):
        return "name without a key or an extension"
    return ""
