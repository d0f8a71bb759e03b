"""Compares one shard with its manifest and its index; `data.verify` has processes do this.

The tar is read once, from front to back, and after whatever is damaged the check goes on.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.images import UndecodableError
from data.index import ShardIndex, index_path
from data.manifest import Manifest, ShardEntry, file_sha256, shard_counts
from data.media_files import check_decodes
from data.tars import CorruptShardError, ends_at, padded, read_headers, split_name

_READ_BYTES = 2**20
RESTORE = (
    "restore it from a copy, or make it again: `mneme data build`, or `mneme data index` for shards that "
    "others wrote"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written."""

    source: str
    shard: str
    """Name of the file; empty if it concerns more than one."""
    key: str
    """Name of the sample; empty if it concerns more than one."""
    problem: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCheck:
    """What is to be checked."""

    folder: Path
    manifest: Manifest
    """Without its shards."""
    entry: ShardEntry
    decode: bool
    """Decode images and clips, too."""

    @property
    def tar(self) -> Path:
        """The shard."""
        return self.folder / self.entry.name

    def problem(
        self, key: str, problem: str, fix: str = RESTORE, file: Path | None = None
    ) -> Problem:
        """A problem of this shard, or of another file that belongs to it."""
        name = (file or self.tar).name
        return Problem(self.manifest.source, name, key, problem, fix)


def check_shard(check: ShardCheck) -> list[Problem]:
    """Everything that is wrong with a shard.

    Memory: one member, and the index as far as it is mapped.
    """
    problems = list(_check_file(check, check.tar, check.entry.bytes))
    index = _open_index(check, problems)
    if index and index.tokens_beside:
        tokens = index.token_file(check.tar)
        problems += _check_file(check, tokens, index.tokens_file_bytes)
        if tokens.is_file():
            problems += _check_tokens_beside(check, index, tokens)
    if check.tar.is_file() and check.tar.stat().st_size:
        with check.tar.open("rb") as file:
            hashed = _HashedFile(file)
            found = list(_check_tar(check, index, hashed)) if index else []
            intact = hashed.sha256() == check.entry.sha256
        if not (found or problems or intact) or (index is None and not intact):
            found.append(check.problem("", "its SHA-256 is not the one in the manifest"))
        problems += found
    return problems


def _check_file(check: ShardCheck, file: Path, size: int) -> Iterator[Problem]:
    if not file.is_file():
        yield check.problem("", "is missing", file=file)
    elif not file.stat().st_size and size:
        yield check.problem("", f"is empty, but {size} bytes were written", file=file)
    elif file.stat().st_size != size:
        found = file.stat().st_size
        yield check.problem("", f"has {found} bytes, but {size} were written", file=file)


def _open_index(check: ShardCheck, problems: list[Problem]) -> ShardIndex | None:
    """The index if it is the one that was written; adds to the problems otherwise."""
    path = index_path(check.tar)
    if not path.is_file():
        problems.append(check.problem("", "is missing", file=path))
        return None
    if file_sha256(path, key=str(path)) != check.entry.index_sha256:
        text = "is not the index in the manifest (SHA-256): samples of its shard were not compared"
        problems.append(check.problem("", text, file=path))
        return None
    try:
        index = ShardIndex.parse(np.memmap(path, np.uint8, "r"), path.name)
    except (CorruptShardError, ValueError) as error:
        problems.append(check.problem("", str(error), file=path))
        return None
    listed = {name: getattr(check.entry, name) for name in shard_counts(index)}
    if listed != shard_counts(index):
        text = f"the manifest lists {listed}, but the index {shard_counts(index)}"
        problems.append(check.problem("", text))
    return index


def _check_tar(check: ShardCheck, index: ShardIndex, file: "_HashedFile") -> Iterator[Problem]:
    """Go through the members in the order of the index."""
    position = 0
    for sample in range(len(index)):
        key = index.key(sample)
        for member in index.members(sample):
            offset, size = int(index.offset[member]), int(index.size[member])
            if offset + size > file.size:
                text = f"{_extension(index, member)} is cut off: the shard ends before it does"
                yield check.problem(key, text)
                break
            for text in _check_header(check.tar, index, member, position, file):
                yield check.problem(key, text)
            file.seek(offset)
            payload = file.read(size)
            if zlib.crc32(payload) != index.crc32[member]:
                text = f"{_extension(index, member)} is not what was written (CRC-32)"
                yield check.problem(key, text)
            else:
                for text in _check_payload(check, index, sample, member, payload):
                    yield check.problem(key, text)
            position = offset + padded(size)
    if file.size == index.tar_bytes:  # else it is known that the end is another
        yield from _check_end(check, file, position)


def _check_header(
    tar: Path, index: ShardIndex, member: int, position: int, file: "_HashedFile"
) -> Iterator[str]:
    """Compare with what is read from `position`, where the header is expected."""
    offset, name = int(index.offset[member]), index.member_name(member)
    file.seek(position)
    try:
        # Between two samples there may be members that the index leaves out.
        for info, _ in read_headers(tar, file):
            if info.offset_data < offset:
                continue
            if (info.offset_data, info.name, info.size) == (offset, name, index.size[member]):
                return
            break
    except CorruptShardError:
        pass
    yield f"header of {_extension(index, member)} is damaged: stock readers stop before it"


def _check_payload(
    check: ShardCheck, index: ShardIndex, sample: int, member: int, payload: bytes
) -> Iterator[str]:
    """Check what the bytes mean, which are those that were written."""
    if not index.tokens_beside and index.offset[member] == index.token_offset[sample]:
        yield from _check_tokens(check, index, sample, payload)
    if check.decode:
        for medium in index.media(sample):
            if medium.member == member:
                extension = _extension(index, member)
                try:
                    check_decodes(extension, payload, medium)
                except UndecodableError as error:
                    yield f"{extension} cannot be decoded: {error}"


def _check_tokens(check: ShardCheck, index: ShardIndex, sample: int, raw: bytes) -> Iterator[str]:
    size = int(index.num_tokens[sample]) * index.token_bytes
    if len(raw) != size:
        yield f"token ids are cut off: {len(raw)} bytes of {size}"
        return
    if zlib.crc32(raw) != index.token_crc32[sample]:
        yield "token ids are not what was written (CRC-32)"
        return
    tokens = np.frombuffer(raw, index.token_dtype)
    if tokens.max(initial=0) >= check.manifest.vocab_size:
        yield f"token id {tokens.max()} is not below the vocabulary of {check.manifest.vocab_size}"
    marker = check.manifest.media_token_id
    places = [] if marker is None else np.flatnonzero(tokens == marker).tolist()
    listed = [medium.place for medium in index.media(sample)]
    if places != listed:
        yield f"media are marked at tokens {places}, but the index lists {listed}"


def _check_tokens_beside(check: ShardCheck, index: ShardIndex, path: Path) -> Iterator[Problem]:
    with path.open("rb") as file:
        for sample in range(len(index)):
            file.seek(int(index.token_offset[sample]))
            raw = file.read(int(index.num_tokens[sample]) * index.token_bytes)
            for text in _check_tokens(check, index, sample, raw):
                yield check.problem(index.key(sample), text, file=path)


def _check_end(check: ShardCheck, file: "_HashedFile", position: int) -> Iterator[Problem]:
    """After the last sample come members that the index leaves out, and zeros."""
    file.seek(position)
    try:
        for _, stop in read_headers(check.tar, file):
            position = stop
        whole = ends_at(file, position)
    except CorruptShardError:
        whole = False
    if not whole:
        yield check.problem("", f"the end is damaged: no blocks of zeros from byte {position} on")


def _extension(index: ShardIndex, member: int) -> str:
    return split_name(index.member_name(member))[1]


class _HashedFile(io.BufferedIOBase):
    """A file that is hashed while it is read, each byte once; skipped bytes are read, too."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hashed = 0
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET
        self._file.seek(min(offset, self._hashed))
        while (at := self._file.tell()) < offset and self.read(min(_READ_BYTES, offset - at)):
            pass
        return self._file.seek(offset)

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        new = data[max(0, self._hashed - start) :]
        self._digest.update(new)
        self._hashed += len(new)
        return data

    def sha256(self) -> str:
        """Of the whole file."""
        self.seek(self.size)
        return self._digest.hexdigest()
