"""Makes the index of a shard, when it has been written and when others wrote it.

`data.shards` calls `build_index` for what it wrote; `data.foreign` adds the samples itself.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.index import MEDIUM_KINDS, TOKEN_DTYPES, Medium, ShardIndex
from data.tars import CorruptShardError, TarMember, read_samples

_MEDIA_FIELDS = (
    ("member", np.uint64),
    ("place", np.uint64),
    ("width", np.uint32),
    ("height", np.uint32),
    ("frames", np.uint32),
    ("first_frame", np.uint32),
    ("fps", np.float32),
)


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
            media_kind=np.array([MEDIUM_KINDS.index(m.kind) for m in self._media], np.uint8),
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
