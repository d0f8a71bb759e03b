"""Sidecar index of a shard: where each member and each document's token ids lie, and checksums.

Written once by `data.shards` or `data.foreign`, memory-mapped by every rank in `data.reader`. A tar
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

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.tars import CorruptShardError, TarMember, read_samples, split_name

INDEX_SUFFIX, TOKENS_SUFFIX = ".widx", ".tokens"
TOKEN_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
}
"""Extension of the member that holds a sample's token ids -> their type."""
MediumKind: TypeAlias = Literal["image", "video"]
_KINDS: tuple[MediumKind, ...] = ("image", "video")
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

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Type of the stored token ids."""
        return np.dtype(f"<u{self.token_bytes}")

    def token_file(self, tar: Path) -> Path:
        """The file that holds the token ids: `tar` or the one beside it."""
        return tokens_path(tar) if self.tokens_beside else tar

    def member_name(self, member: int) -> str:
        """Name in the tar: key, dot, extension."""
        name = self.names[int(self.first_name[member]) : int(self.first_name[member + 1])]
        return name.tobytes().decode(errors="surrogateescape")

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
                kind=_KINDS[self.media_kind[i]],
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


class IndexBuilder:
    """Collects the samples of one shard, in the order of the tar."""

    def __init__(self) -> None:
        self._first_member = [0]
        self._first_media = [0]
        self._tokens: list[tuple[int, int, int]] = []  # offset, number, CRC-32
        self._members: list[tuple[int, int, int]] = []  # offset, size, CRC-32
        self._names: list[bytes] = []
        self._media: list[Medium] = []

    def add(
        self,
        members: Sequence[TarMember],
        media: Sequence[Medium],
        *,
        token_offset: int,
        num_tokens: int,
        token_crc32: int,
    ) -> None:
        """Add a sample; `Medium.member` counts from its first member."""
        first = len(self._members)
        self._members += [(m.offset, len(m.payload), m.crc32) for m in members]
        self._names += [m.name.encode(errors="surrogateescape") for m in members]
        self._media += [replace(medium, member=first + medium.member) for medium in media]
        self._tokens.append((token_offset, num_tokens, token_crc32))
        self._first_member.append(len(self._members))
        self._first_media.append(len(self._media))

    def finish(
        self, *, tar_bytes: int, token_bytes: int, tokens_file_bytes: int | None = None
    ) -> ShardIndex:
        """The index of all that was added.

        Args:
            tar_bytes: size of the tar.
            token_bytes: of one token id.
            tokens_file_bytes: size of NAME.tar.tokens; None: the token ids lie in the tar.
        """
        tokens = np.array(self._tokens, np.uint64).reshape(-1, 3)
        members = np.array(self._members, np.uint64).reshape(-1, 3)
        media: dict[str, NDArray[Any]] = {
            f"media_{name}": np.array([getattr(m, name) for m in self._media], dtype)
            for name, dtype in _MEDIA_FIELDS
        }
        return ShardIndex(
            tar_bytes=tar_bytes,
            tokens_beside=tokens_file_bytes is not None,
            tokens_file_bytes=tokens_file_bytes or 0,
            token_bytes=token_bytes,
            first_member=np.array(self._first_member, np.uint64),
            first_media=np.array(self._first_media, np.uint64),
            token_offset=tokens[:, 0],
            num_tokens=tokens[:, 1],
            token_crc32=tokens[:, 2].astype(np.uint32),
            offset=members[:, 0],
            size=members[:, 1],
            crc32=members[:, 2].astype(np.uint32),
            first_name=np.cumsum([0, *map(len, self._names)], dtype=np.uint64),
            names=np.frombuffer(b"".join(self._names), np.uint8),
            media_kind=np.array([_KINDS.index(m.kind) for m in self._media], np.uint8),
            **media,
        )


def build_index(tar: Path, *, media_token_id: int | None = None) -> ShardIndex:
    """Index a shard of `data.shards` by reading all of it.

    Args:
        tar: members KEY.json and KEY.u16 or KEY.u32, perhaps KEY.txt and media.
        media_token_id: marks a medium among the token ids; None: there are no media.

    Raises:
        CorruptShardError: the tar is cut short or damaged, a sample has not exactly one member of
            token ids, its JSON and its markers do not fit its media, or a key comes twice.
    """
    builder = IndexBuilder()
    keys: set[str] = set()
    extensions: set[str] = set()
    for sample in read_samples(tar):
        where = f"{tar}, key {sample[0].key}"
        if sample[0].key in keys:
            raise CorruptShardError(
                f"{where}: comes twice, or its members do not follow each other"
            )
        keys.add(sample[0].key)
        token_members = [member for member in sample if member.extension in TOKEN_DTYPES]
        if len(token_members) != 1 or not token_members[0].payload:
            raise CorruptShardError(
                f"{where}: needs one member of token ids, .u16 or .u32, that is not empty"
            )
        [member] = token_members
        extensions.add(member.extension)
        tokens = np.frombuffer(member.payload, TOKEN_DTYPES[member.extension])
        builder.add(
            sample,
            [] if media_token_id is None else _media(sample, tokens, media_token_id, where),
            token_offset=member.offset,
            num_tokens=len(tokens),
            token_crc32=member.crc32,
        )
    if len(extensions) != 1:
        raise CorruptShardError(f"{tar}: needs samples whose token ids are all u16 or all u32")
    return builder.finish(
        tar_bytes=tar.stat().st_size, token_bytes=TOKEN_DTYPES[extensions.pop()].itemsize
    )


def index_path(tar: Path) -> Path:
    """Sidecar of a shard."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def tokens_path(tar: Path) -> Path:
    """Token ids of a shard that others wrote."""
    return tar.with_name(tar.name + TOKENS_SUFFIX)


def _media(
    sample: list[TarMember],
    tokens: NDArray[np.unsignedinteger],
    media_token_id: int,
    where: str,
) -> list[Medium]:
    """Media of a sample from its JSON, each with its marker."""
    places = np.flatnonzero(tokens == media_token_id).tolist()
    numbers = {member.extension: number for number, member in enumerate(sample)}
    try:
        metadata = json.loads(sample[numbers["json"]].payload)
        parts = [part for part in metadata.get("seq", ()) if "t" not in part]
        if len(parts) != len(places):
            raise ValueError(f"{len(places)} markers")
        return [_medium(part, numbers, place) for part, place in zip(parts, places, strict=True)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptShardError(
            f"{where}: its JSON does not describe its media: {error!r}"
        ) from error


def _medium(part: dict[str, Any], numbers: dict[str, int], place: int) -> Medium:
    if "img" in part:
        return Medium(
            member=numbers[part["img"]],
            place=place,
            kind="image",
            width=part["w"],
            height=part["h"],
        )
    return Medium(
        member=numbers[part["vid"]],
        place=place,
        kind="video",
        width=part["w"],
        height=part["h"],
        frames=part["n"],
        fps=part["fps"],
        first_frame=part["start"],
    )


_MEDIA_FIELDS = (
    ("member", np.uint64),
    ("place", np.uint64),
    ("width", np.uint32),
    ("height", np.uint32),
    ("frames", np.uint32),
    ("first_frame", np.uint32),
    ("fps", np.float32),
)


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
