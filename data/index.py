"""Sidecar index of a shard: where each member of the tar lies, and its checksum.

Written once by `data.shards`, memory-mapped by every rank in `data.reader`. A tar alone cannot be
read at random, and stock tar readers take a damaged header for the end of the archive; with
the index every sample is expected, and every byte that is read is checked.

`NAME.tar.widx`, little-endian: a header (`_HEADER`: magic, bytes of the tar, samples, members, bytes
of the names, bytes per token), then these arrays in this order:

    first_member  u64 [samples + 1]   members of sample i are first_member[i] .. first_member[i + 1]
    token_member  u64 [samples]       the member that holds its tokens
    num_tokens    u64 [samples]
    offset        u64 [members]       of the payload in the tar
    size          u64 [members]       of the payload in bytes
    first_name    u64 [members + 1]   bytes of the member's name in names
    crc32         u32 [members]       of the payload
    names         u8  [bytes of the names]
"""

import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

INDEX_SUFFIX = ".widx"
TOKEN_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}
"""Extension of the member that holds a sample's token ids -> their type."""
_MAGIC = b"MNEMEIX1"
_HEADER = struct.Struct("<8s5Q")
_BLOCK = 512


class CorruptShardError(RuntimeError):
    """Bytes on disk are not the ones that were written. Names the shard and, if known, the sample."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Index of one shard; arrays as in the module's docstring, memory-mapped if `opened`."""

    tar_bytes: int
    token_bytes: int
    first_member: NDArray[np.uint64]
    token_member: NDArray[np.uint64]
    num_tokens: NDArray[np.uint64]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint64]
    first_name: NDArray[np.uint64]
    crc32: NDArray[np.uint32]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.num_tokens)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Type of the stored token ids."""
        return np.dtype(f"<u{self.token_bytes}")

    def member_name(self, member: int) -> str:
        """Name in the tar: key, dot, extension."""
        name = self.names[int(self.first_name[member]) : int(self.first_name[member + 1])]
        return name.tobytes().decode()

    def key(self, sample: int) -> str:
        """What the members of a sample are called, without their extension."""
        return split_name(self.member_name(int(self.first_member[sample])))[0]

    @staticmethod
    def open(tar: Path) -> "ShardIndex":
        """Memory-map the index of `tar`.

        Raises:
            CorruptShardError: the tar or the index has another size than when they were written.
            FileNotFoundError: either is missing.
        """
        path = index_path(tar)
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise CorruptShardError(f"{path}: not a shard index of this version")
        _, tar_bytes, samples, members, names_bytes, token_bytes = _HEADER.unpack(header)
        lengths = _lengths(samples, members, names_bytes)
        expected = _HEADER.size + sum(np.dtype(t).itemsize * n for _, t, n in lengths)
        for file_path, size in ((path, expected), (tar, tar_bytes)):
            if file_path.stat().st_size != size:
                raise CorruptShardError(
                    f"{file_path}: {file_path.stat().st_size} bytes, but {size} were written"
                )
        raw = np.memmap(path, np.uint8, "r", _HEADER.size)
        arrays: dict[str, NDArray[Any]] = {}
        start = 0
        for name, dtype, length in lengths:
            stop = start + np.dtype(dtype).itemsize * length
            arrays[name], start = raw[start:stop].view(dtype), stop
        return ShardIndex(tar_bytes=tar_bytes, token_bytes=token_bytes, **arrays)

    def write(self, tar: Path) -> None:
        """Write the sidecar of `tar`."""
        samples, members, names_bytes = len(self), len(self.offset), len(self.names)
        with index_path(tar).open("wb") as file:
            file.write(
                _HEADER.pack(
                    _MAGIC, self.tar_bytes, samples, members, names_bytes, self.token_bytes
                )
            )
            for name, dtype, _ in _lengths(samples, members, names_bytes):
                file.write(getattr(self, name).astype(dtype).tobytes())


def build_index(tar: Path) -> ShardIndex:
    """Index a shard by reading all of it.

    Raises:
        CorruptShardError: the tar is cut short or damaged, a sample has not exactly one member of
            token ids, or a key comes twice.
    """
    names: list[bytes] = []
    members: list[tuple[int, int, int]] = []
    samples: list[tuple[int, int, int]] = []  # first member, token member, number of tokens
    token_sizes: set[int] = set()
    for sample in _samples(tar):
        tokens = [i for i, member in enumerate(sample) if member.extension in TOKEN_DTYPES]
        if len(tokens) != 1 or sample[tokens[0]].size == 0:
            raise CorruptShardError(
                f"{tar}, key {sample[0].key}: needs one member of token ids, .u16 or .u32, that "
                "is not empty"
            )
        member = sample[tokens[0]]
        item = TOKEN_DTYPES[member.extension].itemsize
        token_sizes.add(item)
        samples.append((len(members), len(members) + tokens[0], member.size // item))
        members += [(m.offset, m.size, m.crc32) for m in sample]
        names += [f"{m.key}.{m.extension}".encode() for m in sample]
    if len(token_sizes) != 1:
        raise CorruptShardError(f"{tar}: needs samples whose token ids are all u16 or all u32")
    sample_table = np.array(samples, np.uint64)
    member_table = np.array(members, np.uint64)
    return ShardIndex(
        tar_bytes=tar.stat().st_size,
        token_bytes=token_sizes.pop(),
        first_member=np.append(sample_table[:, 0], np.uint64(len(members))),
        token_member=sample_table[:, 1],
        num_tokens=sample_table[:, 2],
        offset=member_table[:, 0],
        size=member_table[:, 1],
        first_name=np.cumsum([0, *map(len, names)], dtype=np.uint64),
        crc32=member_table[:, 2].astype(np.uint32),
        names=np.frombuffer(b"".join(names), np.uint8),
    )


def index_path(tar: Path) -> Path:
    """Sidecar of a shard."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    extension: str
    offset: int
    size: int
    crc32: int


def _samples(tar: Path) -> list[list[_Member]]:
    """Members of the tar, grouped by key."""
    groups: dict[str, list[_Member]] = {}
    end, previous = 0, ""
    with tar.open("rb") as file:
        for member in _members(tar, file):
            if member.key in groups and member.key != previous:
                raise CorruptShardError(
                    f"{tar}, key {member.key}: comes twice, or its members do not follow each other"
                )
            groups.setdefault(member.key, []).append(member)
            previous = member.key
            end = member.offset + -(-member.size // _BLOCK) * _BLOCK
        file.seek(end)
        rest = file.read()
    # tarfile takes a damaged header for the end; the true end is two or more blocks of zeros.
    if len(rest) < 2 * _BLOCK or rest.strip(b"\0"):
        raise CorruptShardError(f"{tar}: damaged or cut short after {previous or 'the start'}")
    return list(groups.values())


def _members(tar: Path, file: BinaryIO) -> Iterator[_Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                payload = archive.extractfile(info)
                if payload is None:
                    raise CorruptShardError(f"{tar}, {info.name}: not a file")
                crc = zlib.crc32(payload.read())
                yield _Member(*split_name(info.name), info.offset_data, info.size, crc)
    except tarfile.TarError as error:
        raise CorruptShardError(f"{tar}: {error}") from error


def _lengths(samples: int, members: int, names_bytes: int) -> list[tuple[str, str, int]]:
    """Name, type and length of the arrays, in the order of the file."""
    return [
        ("first_member", "<u8", samples + 1),
        ("token_member", "<u8", samples),
        ("num_tokens", "<u8", samples),
        ("offset", "<u8", members),
        ("size", "<u8", members),
        ("first_name", "<u8", members + 1),
        ("crc32", "<u4", members),
        ("names", "u1", names_bytes),
    ]
