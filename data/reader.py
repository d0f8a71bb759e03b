"""Reads documents of one split of one source at random, and checks every byte.

`data.loader` opens one per source on every rank; `data.lanes` asks it for lengths. Opening
memory-maps the indexes and reads no document. The payload is read with a positional read, not
through a memory map of the tar, for a file that shrinks under a map kills the process.
"""

import os
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.index import ShardIndex, index_path
from data.shards import HOW_TO_BUILD, Manifest, ShardEntry
from data.tars import CorruptShardError


class SplitReader:
    """The documents of a split, numbered through its shards in the order of the manifest."""

    def __init__(self, folder: Path, *, source: str, split: str) -> None:
        """Open the shards of `folder`/`split`.

        Raises:
            ValueError: the folder, the manifest or a shard is missing.
            CorruptShardError: a shard or its index differs from the manifest.
        """
        self.source = source
        key = f"data.sources.{source}.path={folder}"
        self.manifest = Manifest.read(folder / split, key=key)
        self._tars = [folder / split / shard.name for shard in self.manifest.shards]
        self._indexes = [
            _open_index(tar, shard, key)
            for tar, shard in zip(self._tars, self.manifest.shards, strict=True)
        ]
        self._starts = list(accumulate(map(len, self._indexes), initial=0))
        self._files: dict[int, int] = {}

    def __del__(self) -> None:
        """Close the shards that were read from."""
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def __len__(self) -> int:
        """Number of documents."""
        return self._starts[-1]

    def num_tokens(self, document: int) -> int:
        """Length of a document in tokens, from the index alone."""
        shard, sample = self._locate(document)
        return int(self._indexes[shard].num_tokens[sample])

    def tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """Token ids of a document, its end-of-document id included; shape [num_tokens].

        Raises:
            CorruptShardError: the bytes are not those that were written.
        """
        shard, sample = self._locate(document)
        index = self._indexes[shard]
        size = int(index.num_tokens[sample]) * index.token_bytes
        payload = os.pread(self._file(shard), size, int(index.token_offset[sample]))
        expected = int(index.token_crc32[sample])
        if len(payload) != size or zlib.crc32(payload) != expected:
            raise CorruptShardError(
                f"source {self.source}, shard {self._tars[shard]}, key {index.key(sample)}: "
                f"{len(payload)} bytes with CRC-32 {zlib.crc32(payload):08x}, but {size} with "
                f"{expected:08x} were written; restore the shard from a copy, or "
                f"remove the corpus and {HOW_TO_BUILD}"
            )
        return np.frombuffer(payload, index.token_dtype)

    def _locate(self, document: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, document) - 1
        return shard, document - self._starts[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(
                self._indexes[shard].token_file(self._tars[shard]), os.O_RDONLY
            )
        return self._files[shard]


def _open_index(tar: Path, shard: ShardEntry, key: str) -> ShardIndex:
    for path in (tar, index_path(tar)):
        if not path.is_file():
            raise ValueError(
                f"{key}: the manifest lists {path.absolute()}, which is missing; restore it from a "
                f"copy, or remove the corpus and {HOW_TO_BUILD}"
            )
    index = ShardIndex.open(tar)
    if (len(index), index.tar_bytes) != (shard.samples, shard.bytes):
        raise CorruptShardError(
            f"{key}: {tar} has {len(index)} samples in {index.tar_bytes} bytes, but the manifest "
            f"lists {shard.samples} in {shard.bytes}; restore the shard and its index from a copy"
        )
    return index
