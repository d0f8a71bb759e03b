"""Sidecar index of a shard: where each member and each document's token ids lie, and checksums.

Written once by `data.indexing`, memory-mapped by every rank in `data.reader`. A tar
alone cannot be read at random, and stock tar readers take a damaged header for the end of the
archive; with the index every sample is expected, and every byte that is read is checked.

`NAME.tar.widx`, little-endian: a header (`_HEADER`: magic, then u64: bytes of the tar, 1 if the token
ids lie in NAME.tar.tokens and 0 if in the tar, bytes of that file or 0, bytes per token, samples,
members, media, bytes of the names), then these arrays in this order:

    first_member       u64 [samples + 1]   members of sample i are first_member[i] .. first_member[i + 1]
    first_media        u64 [samples + 1]   likewise its images and clips, in order of appearance
    token_offset       u64 [samples]       of its token ids in their file
    num_tokens         u64 [samples]       one for each medium, the end of document included
    offset             u64 [members]       of the payload in the tar
    size               u64 [members]       of the payload in bytes
    first_name         u64 [members + 1]   bytes of the member's name in names
    media_member       u64 [media]         the member that holds it
    media_place        u64 [media]         which token of its sample is its marker
    token_crc32        u32 [samples]       of the token ids' bytes
    crc32              u32 [members]       of the payload
    media_width        u32 [media]         in pixels
    media_height       u32 [media]
    media_frames       u32 [media]         1 for images
    media_first_frame  u32 [media]         first frame of the file that counts
    media_fps          f32 [media]         0 for images
    media_kind         u8  [media]         0 image, 1 video
    names              u8  [bytes of the names]
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.tars import CorruptShardError, split_name

INDEX_SUFFIX, TOKENS_SUFFIX = ".widx", ".tokens"
TOKEN_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}
"""Extension of the member that holds a sample's token ids -> their type."""
MediumKind: TypeAlias = Literal["image", "video"]
MEDIUM_KINDS: tuple[MediumKind, ...] = ("image", "video")
_MAGIC, _MAGIC_1 = b"MNEMEIX2", b"MNEMEIX1"
_HEADER = struct.Struct("<8s8Q")
_REMEDY = (
    "build the corpus again with `mneme data build`; shards that others wrote, with `mneme data "
    "index FOLDER --tokenizer FILE`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """An image or clip of a document, as far as the index knows it."""

    member: int
    """The member of the shard that holds it."""
    place: int
    """Index of its marker among the document's stored tokens."""
    kind: MediumKind
    width: int
    """In pixels."""
    height: int
    frames: int = 1
    """1 for images."""
    fps: float = 0.0
    """Frames per second; 0 for images."""
    first_frame: int = 0
    """First frame of the file that counts."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Index of one shard; arrays as in the module's docstring, memory-mapped if `opened`."""

    tar_bytes: int
    tokens_beside: bool
    """Whether the token ids lie in NAME.tar.tokens."""
    tokens_file_bytes: int
    token_bytes: int
    first_member: NDArray[np.uint64]
    first_media: NDArray[np.uint64]
    token_offset: NDArray[np.uint64]
    num_tokens: NDArray[np.uint64]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint64]
    first_name: NDArray[np.uint64]
    media_member: NDArray[np.uint64]
    media_place: NDArray[np.uint64]
    token_crc32: NDArray[np.uint32]
    crc32: NDArray[np.uint32]
    media_width: NDArray[np.uint32]
    media_height: NDArray[np.uint32]
    media_frames: NDArray[np.uint32]
    media_first_frame: NDArray[np.uint32]
    media_fps: NDArray[np.float32]
    media_kind: NDArray[np.uint8]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.num_tokens)

    @cached_property
    def token_dtype(self) -> np.dtype[Any]:
        """Type of the stored token ids."""
        return np.dtype(f"<u{self.token_bytes}")

    def token_file(self, tar: Path) -> Path:
        """The file that holds the token ids: `tar` or the one beside it."""
        return tokens_path(tar) if self.tokens_beside else tar

    def member_name(self, member: int) -> str:
        """Name in the tar: key, dot, extension."""
        start, end = self.first_name[member : member + 2].tolist()
        return self.names[start:end].tobytes().decode("utf-8", "surrogateescape")

    def extensions(self, first: int, stop: int) -> list[str]:
        """Extensions of neighbouring members of one sample, as `split_name` has them."""
        bounds = self.first_name[first : stop + 1].tolist()
        start = bounds[0]
        text = self.names[start : bounds[-1]].tobytes()
        name_of_file = text.rfind(b"/", 0, bounds[1] - start) + 1
        after_key = text.index(b".", name_of_file) + 1 - start
        return [
            text[a + after_key : b - start].decode("utf-8", "surrogateescape")
            for a, b in pairwise(bounds)
        ]

    def members(self, sample: int) -> range:
        """The members of a sample."""
        return range(int(self.first_member[sample]), int(self.first_member[sample + 1]))

    def key(self, sample: int) -> str:
        """What the members of a sample are called, without their extension."""
        return split_name(self.member_name(int(self.first_member[sample])))[0]

    def media(self, sample: int) -> list[Medium]:
        """Images and clips of a sample, in order of appearance."""
        return [
            Medium(
                member=int(self.media_member[i]),
                place=int(self.media_place[i]),
                kind=MEDIUM_KINDS[self.media_kind[i]],
                width=int(self.media_width[i]),
                height=int(self.media_height[i]),
                frames=int(self.media_frames[i]),
                fps=float(self.media_fps[i]),
                first_frame=int(self.media_first_frame[i]),
            )
            for i in range(int(self.first_media[sample]), int(self.first_media[sample + 1]))
        ]

    @staticmethod
    def parse(raw: NDArray[np.uint8], place: object) -> "ShardIndex":
        """View the bytes of an index; constant time.

        Args:
            raw: all of the file.
            place: names the file in errors.

        Raises:
            CorruptShardError: it is of another version, or has another size than when it was written.
        """
        header = raw[: _HEADER.size].tobytes()
        if header[: len(_MAGIC_1)] == _MAGIC_1:
            raise CorruptShardError(f"{place}: index of version 1, not 2; {_REMEDY}")
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise CorruptShardError(f"{place}: not a shard index of version 2; {_REMEDY}")
        _, tar_bytes, beside, tokens_file_bytes, token_bytes, *counts = _HEADER.unpack(header)
        arrays: dict[str, NDArray[Any]] = {}
        start = _HEADER.size
        for name, dtype, length in _layout(*counts):
            stop = start + np.dtype(dtype).itemsize * length
            if stop <= len(raw):
                arrays[name] = raw[start:stop].view(dtype)
            start = stop
        if start != len(raw):
            raise CorruptShardError(f"{place}: {len(raw)} bytes, but {start} were written")
        return ShardIndex(
            tar_bytes=tar_bytes,
            tokens_beside=bool(beside),
            tokens_file_bytes=tokens_file_bytes,
            token_bytes=token_bytes,
            **arrays,
        )

    @staticmethod
    def open(tar: Path) -> "ShardIndex":
        """Memory-map the index of `tar`.

        Raises:
            CorruptShardError: the tar, the index or the token file has another size than when they
                were written, or the index is of another version.
            FileNotFoundError: one of them is missing.
        """
        path = index_path(tar)
        if not path.stat().st_size:  # cannot be mapped
            raise CorruptShardError(f"{path}: not a shard index of version 2; {_REMEDY}")
        index = ShardIndex.parse(np.memmap(path, np.uint8, "r"), path)
        for name, size in index.file_bytes(tar.name).items():
            found = tar.with_name(name).stat().st_size
            if found != size:
                raise CorruptShardError(
                    f"{tar.with_name(name)}: {found} bytes, but {size} were written"
                )
        return index

    def file_bytes(self, tar: str) -> dict[str, int]:
        """Names and sizes of the files that the index describes, of which `tar` is the first."""
        beside = {tar + TOKENS_SUFFIX: self.tokens_file_bytes} if self.tokens_beside else {}
        return {tar: self.tar_bytes} | beside

    def write(self, tar: Path) -> None:
        """Write the sidecar of `tar`, whole or not at all."""
        counts = (len(self), len(self.offset), len(self.media_kind), len(self.names))
        path = index_path(tar)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.write(
                _HEADER.pack(
                    _MAGIC,
                    self.tar_bytes,
                    self.tokens_beside,
                    self.tokens_file_bytes,
                    self.token_bytes,
                    *counts,
                )
            )
            for name, dtype, _ in _layout(*counts):
                file.write(getattr(self, name).astype(dtype).tobytes())
        partial.rename(path)


def index_path(tar: Path) -> Path:
    """Sidecar of a shard."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def tokens_path(tar: Path) -> Path:
    """Token ids of a shard that others wrote."""
    return tar.with_name(tar.name + TOKENS_SUFFIX)


def _layout(samples: int, members: int, media: int, names_bytes: int) -> list[tuple[str, str, int]]:
    """Name, type and length of the arrays, in the order of the file."""
    return [
        ("first_member", "<u8", samples + 1),
        ("first_media", "<u8", samples + 1),
        ("token_offset", "<u8", samples),
        ("num_tokens", "<u8", samples),
        ("offset", "<u8", members),
        ("size", "<u8", members),
        ("first_name", "<u8", members + 1),
        ("media_member", "<u8", media),
        ("media_place", "<u8", media),
        ("token_crc32", "<u4", samples),
        ("crc32", "<u4", members),
        ("media_width", "<u4", media),
        ("media_height", "<u4", media),
        ("media_frames", "<u4", media),
        ("media_first_frame", "<u4", media),
        ("media_fps", "<f4", media),
        ("media_kind", "u1", media),
        ("names", "u1", names_bytes),
    ]
