"""Reads documents of one split of one source at random, and checks every byte.

`data.sources` opens one per source on every rank; `data.lanes` asks it for lengths. Opening views the
indexes and lists the folder; it reads no document.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # four times as fast as zlib's
from numpy.typing import NDArray

from data.config import FaultConfig
from data.content import Content
from data.faults import Cause, DamagedSampleError, Fault
from data.index import INDEX_SUFFIX, TOKENS_SUFFIX, Medium, ShardIndex
from data.manifest import HOW_TO_BUILD, MANIFEST_NAME, WITHOUT_SPLITS, Manifest, ShardEntry
from data.storage import Folder, inside, open_folder
from data.tars import CorruptShardError

_REMEDY = (
    f"restore the shard from a copy, or remove the corpus and {HOW_TO_BUILD}; to train without what "
    "is damaged, use data.faults.damaged=skip"
)


class SplitReader:
    """The documents of a split, numbered through its shards in the order of the manifest.

    A `data.content.Documents` of text; `data.pictures` makes one of documents with media from it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        source: str,
        split: str,
        faults: FaultConfig | None = None,
    ) -> None:
        """Open the shards of `folder`/`split`, or of `folder` for the split "all".

        With `faults.damaged=skip` shards may be missing or have another size than was written; their
        indexes must be whole all the same, for they say what is lost.

        Args:
            folder: path or URL of the source.
            source: its name.
            split: train, validation or all.
            faults: what to do about damage; None: the defaults.

        Raises:
            ValueError: the folder, the manifest, an index or a shard is missing.
            CorruptShardError: a shard or its index differs from the manifest.
            UnreadableError: the storage fails.
        """
        self.source = source
        faults = faults or FaultConfig()
        place = str(folder) if split == WITHOUT_SPLITS else inside(str(folder), split)
        self._folder = open_folder(place, faults)
        self._read = self._folder.read
        self._key = f"data.sources.{source}.path={folder}"
        self._sizes = self._folder.sizes()
        self.manifest = read_manifest(self._folder, self._key)
        self._shards = [shard.name for shard in self.manifest.shards]
        self._indexes = [self._open_index(shard) for shard in self.manifest.shards]
        if faults.damaged == "raise":
            for name, index in zip(self._shards, self._indexes, strict=True):
                self._refuse_damaged(name, index)
        self._token_files = [
            name + TOKENS_SUFFIX if index.tokens_beside else name
            for name, index in zip(self._shards, self._indexes, strict=True)
        ]
        self._starts = list(accumulate(map(len, self._indexes), initial=0))

    def __len__(self) -> int:
        """Number of documents."""
        return self._starts[-1]

    def num_tokens(self, document: int) -> int:
        """Length of a document in stored tokens, from the index alone."""
        shard, sample = self._locate(document)
        return self._indexes[shard].num_tokens.item(sample)

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        """Nothing of text must stay whole."""
        return ()

    def media(self, document: int) -> list[Medium]:
        """Images and clips of a document, in order, from the index alone."""
        shard, sample = self._locate(document)
        return self._indexes[shard].media(sample)

    def read(self, document: int) -> Content:
        """The stored tokens of a document.

        Raises:
            DamagedSampleError: they are not what was written.
            UnreadableError: the storage fails.
        """
        return Content(self.stored_tokens(document))

    def stored_tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """Token ids of a document, markers of media and end of document included; [num_tokens].

        Raises:
            DamagedSampleError: they are not what was written.
            UnreadableError: the storage fails.
        """
        # For every document of every rank, so without the calls that `payload` makes.
        shard = bisect_right(self._starts, document) - 1
        sample, index = document - self._starts[shard], self._indexes[shard]
        name, start = self._token_files[shard], index.token_offset.item(sample)
        size = index.num_tokens.item(sample) * index.token_bytes
        try:
            raw = self._read(name, start, size)
        except FileNotFoundError:
            raise self._gone(document, name) from None
        checksum = index.token_crc32.item(sample)
        if len(raw) != size or crc32(raw) != checksum:
            raise self._not_as_written(document, raw, size, checksum)
        return np.frombuffer(raw, index.token_dtype)

    def payload(self, document: int, member: int) -> bytes:
        """A member of a document, such as an image, numbered as in `Medium.member`.

        Raises:
            DamagedSampleError: it is not what was written.
            UnreadableError: the storage fails.
        """
        shard, _ = self._locate(document)
        index = self._indexes[shard]
        size, checksum = index.size.item(member), index.crc32.item(member)
        raw = self._read_of(document, self._shards[shard], index.offset.item(member), size)
        if len(raw) != size or crc32(raw) != checksum:
            raise self._not_as_written(document, raw, size, checksum)
        return raw

    def sample(self, document: int) -> dict[str, bytes]:
        """All members of a document by their extension, in one read.

        Raises:
            DamagedSampleError: one is not what was written.
            UnreadableError: the storage fails.
        """
        shard, number = self._locate(document)
        index = self._indexes[shard]
        first, stop = index.first_member[number : number + 2].tolist()
        offsets, sizes = index.offset[first:stop].tolist(), index.size[first:stop].tolist()
        extensions, sums = index.extensions(first, stop), index.crc32[first:stop].tolist()
        start, end = offsets[0], offsets[-1] + sizes[-1]
        raw = self._read_of(document, self._shards[shard], start, end - start)
        found = {}
        for extension, offset, size, checksum in zip(extensions, offsets, sizes, sums, strict=True):
            at = offset - start
            found[extension] = payload = raw[at : at + size]
            if crc32(payload) != checksum or len(payload) != size:
                raise self._not_as_written(document, payload, size, checksum)
        return found

    def place(self, document: int) -> tuple[str, str]:
        """Shard and key of a document."""
        shard, sample = self._locate(document)
        return self._folder.where(self._shards[shard]), self._indexes[shard].key(sample)

    def fault(self, document: int, cause: Cause, detail: str) -> Fault:
        """What is wrong with a document, with its place."""
        return Fault(self.source, *self.place(document), cause, detail)

    def _locate(self, document: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, document) - 1
        return shard, document - self._starts[shard]

    def _read_of(self, document: int, name: str, start: int, size: int) -> bytes:
        try:
            return self._read(name, start, size)
        except FileNotFoundError:
            raise self._gone(document, name) from None

    def _gone(self, document: int, name: str) -> DamagedSampleError:
        return self._damaged(document, "missing shard", f"{self._folder.where(name)} is gone")

    def _not_as_written(
        self, document: int, raw: bytes, size: int, checksum: int
    ) -> DamagedSampleError:
        if len(raw) != size:
            return self._damaged(document, "truncated", f"{len(raw)} of {size} bytes")
        detail = f"CRC-32 {crc32(raw):08x}, but {checksum:08x} was written"
        return self._damaged(document, "checksum", detail)

    def _damaged(self, document: int, cause: Cause, detail: str) -> DamagedSampleError:
        return DamagedSampleError(self.fault(document, cause, detail), _REMEDY)

    def _open_index(self, shard: ShardEntry) -> ShardIndex:
        name = shard.name + INDEX_SUFFIX
        if name not in self._sizes:
            raise self._missing(name)
        index = ShardIndex.parse(self._folder.view(name), self._folder.where(name))
        if (len(index), index.tar_bytes) != (shard.samples, shard.bytes):
            raise CorruptShardError(
                f"{self._key}: {self._folder.where(name)} lists {len(index)} samples in "
                f"{index.tar_bytes} bytes, but the manifest {shard.samples} in {shard.bytes}; "
                "restore the shard and its index from a copy"
            )
        return index

    def _refuse_damaged(self, shard: str, index: ShardIndex) -> None:
        for name, size in index.file_bytes(shard).items():
            if name not in self._sizes:
                raise self._missing(name)
            if self._sizes[name] != size:
                raise CorruptShardError(
                    f"{self._key}: {self._folder.where(name)} has {self._sizes[name]} bytes, but "
                    f"{size} were written; {_REMEDY}"
                )

    def _missing(self, name: str) -> ValueError:
        return ValueError(
            f"{self._key}: the manifest lists {self._folder.where(name)}, which is missing; {_REMEDY}"
        )


def read_manifest(folder: Folder, key: str) -> Manifest:
    """The manifest in a folder; `key` is the config path that errors name.

    Raises:
        ValueError: there is none, or of another version.
        UnreadableError: the storage fails.
    """
    where = folder.where(MANIFEST_NAME)
    try:
        text = folder.view(MANIFEST_NAME).tobytes()
    except FileNotFoundError:
        raise ValueError(f"{key}: there is no {where}; {HOW_TO_BUILD}") from None
    return Manifest.parse(text, where=where, key=key)
